#include "rollout/decode_graphs.h"

#include <algorithm>
#include <cstring>

#include "tensor/device.h"
#include "tensor/op_profile.h"

namespace lockstep::rollout {

using ops::RowSampling;
using ops::RowStats;
using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::TensorView;

namespace {

// Rows of the graph that runs a batch of S: few sizes, little waste.
std::int64_t padded_rows(std::int64_t S) {
  const std::int64_t step = S <= 8 ? 1 : S <= 64 ? 8 : S <= 256 ? 16 : 64;
  return (S + step - 1) / step * step;
}

std::int64_t padded_pages(std::int64_t pages) {
  std::int64_t P = 8;
  while (P < pages) P *= 2;
  return P;
}

// Where the arrays of B rows with P pages each lie in one block of bytes; each starts at a multiple
// of 256.
struct Layout {
  std::int64_t B, P;
  std::int64_t tokens = 0, positions = 0, slots = 0, offsets = 0, lengths = 0, pages = 0,
               sampling = 0, bytes = 0;

  Layout(std::int64_t rows, std::int64_t pages_a_row) : B(rows), P(pages_a_row) {
    const auto place = [&](std::int64_t& at, std::int64_t size) {
      at = bytes;
      bytes = (bytes + size + 255) / 256 * 256;
    };
    place(tokens, 4 * B), place(positions, 4 * B), place(slots, 4 * B), place(offsets, 4 * (B + 1));
    place(lengths, 4 * B), place(pages, 4 * B * P);
    place(sampling, B * static_cast<std::int64_t>(sizeof(RowSampling)));
  }
};

// The step's values; rows behind the last sequence have no query and write no key.
void fill(const Layout& at, const StepPlan& plan, int block_size, std::vector<std::byte>& bytes) {
  bytes.assign(static_cast<std::size_t>(at.bytes), std::byte{0});
  const auto array = [&](std::int64_t offset) {
    return reinterpret_cast<std::int32_t*>(bytes.data() + offset);
  };
  auto* sampling = reinterpret_cast<RowSampling*>(bytes.data() + at.sampling);
  const auto S = static_cast<std::int64_t>(plan.items.size());
  for (std::int64_t s = 0; s < at.B; ++s) {
    sampling[s] = RowSampling{};
    array(at.slots)[s] = -1;
    array(at.offsets)[s + 1] = static_cast<std::int32_t>(std::min(s + 1, S));
    if (s >= S) continue;
    const StepItem& item = plan.items[s];
    const Sequence& sequence = *item.sequence;
    array(at.tokens)[s] = sequence.tokens[item.begin];
    array(at.positions)[s] = static_cast<std::int32_t>(item.begin);
    array(at.slots)[s] = cache_row(sequence, item.begin, block_size);
    array(at.lengths)[s] = static_cast<std::int32_t>(item.begin + 1);
    std::copy_n(sequence.pages.begin(), (item.begin + block_size) / block_size,
                array(at.pages) + s * at.P);
    sampling[s] = row_sampling(sequence);
  }
}

}  // namespace

bool DecodeGraphs::fits(const Context& ctx, const StepPlan& plan) {
  if (ctx.device != Device::kCuda || plan.items.size() != plan.draws.size()) return false;
  for (std::size_t i = 0; i < plan.items.size(); ++i)
    if (plan.items[i].count != 1 || plan.draws[i].item != static_cast<std::int64_t>(i) ||
        plan.draws[i].sequence != plan.items[i].sequence)
      return false;
  return true;
}

void DecodeGraphs::run(const Context& ctx, const model::ModelView& model, const StepPlan& plan,
                       const Options& options, model::KvCache& cache, Sampled& out) {
  const auto S = static_cast<std::int64_t>(plan.items.size());
  std::int64_t most = 0;
  for (const StepItem& item : plan.items) most = std::max(most, item.begin + 1);
  const Layout at(padded_rows(S),
                  padded_pages((most + options.block_size - 1) / options.block_size));
  const auto output_bytes = at.B * static_cast<std::int64_t>(sizeof(RowStats) + 4);
  if (arena_.device() != ctx.device) arena_ = tensor::Arena(ctx.device);
  if (static_cast<std::int64_t>(input_.view().bytes()) < at.bytes ||
      static_cast<std::int64_t>(output_.view().bytes()) < output_bytes) {
    clear();  // they hold the old addresses
    input_ = tensor::Tensor(ctx.device, DType::kE4m3, {2 * at.bytes});
    output_ = tensor::Tensor(ctx.device, DType::kE4m3, {2 * output_bytes});
  }

  std::vector<std::byte> values;
  fill(at, plan, options.block_size, values);
  tensor::copy_bytes(ctx, values.data(), Device::kCpu, input_.view().data, ctx.device,
                     values.size());
  auto* input = static_cast<std::byte*>(input_.view().data);
  const auto int32 = [&](std::int64_t offset, const tensor::Shape& shape) {
    return TensorView{input + offset, DType::kInt32, ctx.device, shape};
  };
  model::ForwardBatch batch;
  batch.tokens_T = int32(at.tokens, {at.B});
  batch.positions_T = int32(at.positions, {at.B});
  batch.slots_T = int32(at.slots, {at.B});
  batch.attention = {int32(at.offsets, {at.B + 1}),
                     int32(at.lengths, {at.B}),
                     int32(at.pages, {at.B, at.P}),
                     options.block_size,
                     1,
                     at.P * options.block_size};
  auto* stats = static_cast<RowStats*>(output_.view().data);
  const TensorView tokens{stats + at.B, DType::kInt32, ctx.device, {at.B}};
  const auto work = [&] {
    tensor::Context own = ctx;
    own.workspace = &arena_;
    own.profile = nullptr;  // a recorded launch has no time of its own
    const tensor::ArenaScope scratch(arena_);
    const TensorView hidden_BD =
        arena_.take(DType::kBf16, {at.B, model.weights->config.hidden_size});
    model::forward(own, model, batch, &cache, nullptr, hidden_BD);
    sample_rows(own, model, hidden_BD, reinterpret_cast<RowSampling*>(input + at.sampling), tokens,
                stats);
  };
  Step& step = graphs_[{at.B, at.P}];
  if (!step.warm) {
    work();
    step.warm = true;
  } else {
    if (!step.graph) step.graph = tensor::Graph::record(ctx, work);
    const tensor::OpTimer timer(ctx, "decode graph");
    step.graph.launch(ctx);
  }

  std::vector<std::byte> results(static_cast<std::size_t>(output_bytes));
  tensor::copy_bytes(ctx, stats, ctx.device, results.data(), Device::kCpu, results.size());
  out.stats.resize(plan.draws.size());
  out.tokens.resize(plan.draws.size());
  std::memcpy(out.stats.data(), results.data(), plan.draws.size() * sizeof(RowStats));
  std::memcpy(out.tokens.data(), results.data() + at.B * sizeof(RowStats), plan.draws.size() * 4);
}

}  // namespace lockstep::rollout
