#include "model/fp8_import.h"

#include <cmath>
#include <cstring>

#include "base/error.h"
#include "model/strict_json.h"
#include "tensor/device.h"

namespace lockstep::model {

using base::fail;
using base::InputError;
using numerics::Fp8;
using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::TensorView;

static constexpr std::int64_t kBlock = 128;

namespace {

std::int64_t blocks(std::int64_t n) { return (n + kBlock - 1) / kBlock; }

// One expert of a weight, brought to the host, changed there and put back.
template <typename T>
struct Plane {
  TensorView view;  // [1, rows, columns]
  std::vector<T> values;
  std::int64_t rows = 0, columns = 0;

  Plane(const Context& ctx, const TensorView& all, std::int64_t expert)
      : view(all.rows(expert, 1)), rows(all.dim(1)), columns(all.dim(2)) {
    values.resize(static_cast<std::size_t>(rows * columns));
    tensor::download(ctx, view, values.data());
  }
  void put_back(const Context& ctx) {
    TensorView host = view;
    host.data = values.data();
    host.device = Device::kCpu;
    tensor::copy(ctx, host, view);
  }
  T& at(std::int64_t r, std::int64_t c) {
    return values[static_cast<std::size_t>(r * columns + c)];
  }
};

template <typename T>
void transpose(const Plane<T>& from, Plane<T>& to) {
  constexpr std::int64_t kTile = 64;
  for (std::int64_t r0 = 0; r0 < from.rows; r0 += kTile)
    for (std::int64_t c0 = 0; c0 < from.columns; c0 += kTile)
      for (std::int64_t r = r0; r < std::min(from.rows, r0 + kTile); ++r)
        for (std::int64_t c = c0; c < std::min(from.columns, c0 + kTile); ++c)
          to.at(c, r) = from.values[static_cast<std::size_t>(r * from.columns + c)];
}

// Puts the file's codes of all projections of one expert over those of the set, in both copies.
void import_expert(const Context& ctx, const std::vector<StoredWeight>& stored, const Param& param,
                   std::int64_t expert, std::size_t begin, std::size_t end,
                   const ops::Fp8Weight& forward, const ops::Fp8Weight& transposed) {
  Plane<Fp8> codes(ctx, forward.codes_ENK, expert), codes_t(ctx, transposed.codes_ENK, expert);
  Plane<float> scales(ctx, forward.scales, expert), scales_t(ctx, transposed.scales, expert);
  std::vector<float> grid;
  for (std::size_t i = begin; i < end; ++i) {
    const StoredWeight& w = stored[i];
    const ParamPart& part = param.parts[i];
    if (!w.fp8()) continue;
    LOCKSTEP_CHECK(part.row % kBlock == 0, "{} begins at row {}", part.hf_name, part.row);
    read_codes(w, 0, part.rows, &codes.at(part.row, 0), codes.columns);
    grid.resize(static_cast<std::size_t>(w.scales.rows * w.scales.columns));
    read_scales(w, grid.data());
    for (std::int64_t r = 0; r < w.scales.rows; ++r)
      for (std::int64_t c = 0; c < w.scales.columns; ++c)
        scales.at(part.row / kBlock + r, c) =
            grid[static_cast<std::size_t>(r * w.scales.columns + c)];
  }
  transpose(codes, codes_t);
  transpose(scales, scales_t);
  codes.put_back(ctx);
  codes_t.put_back(ctx);
  scales.put_back(ctx);
  scales_t.put_back(ctx);
}

// The codes and scales of a parameter with one part, as the file has them.
void keep_stored(const StoredWeight& w, std::size_t p, QuantizedWeights& q) {
  const std::int64_t N = w.values.rows, K = w.values.columns;
  const tensor::Tensor codes(Device::kCpu, DType::kE4m3, {1, N, K}),
      scales(Device::kCpu, DType::kFp32, {1, w.scales.rows, w.scales.columns});
  read_codes(w, 0, N, static_cast<Fp8*>(codes.view().data), K);
  read_scales(w, scales.as<float>());
  q.stored.resize(q.fp8.size());
  q.stored[p] = {codes, scales, ops::Scaling::kBlock};
  q.stored_memory.push_back(codes);
  q.stored_memory.push_back(scales);
}

std::size_t count_fp8(const std::vector<StoredWeight>& parts) {
  return static_cast<std::size_t>(
      std::count_if(parts.begin(), parts.end(), [](const StoredWeight& w) { return w.fp8(); }));
}

}  // namespace

std::shared_ptr<QuantizedWeights> import_fp8(const Context& ctx, const Checkpoint& c,
                                             Weights& weights, const Precision& precision,
                                             const Log& log) {
  const auto q = quantized_for(ctx, weights, precision);
  if (!has_fp8(c)) return q;
  const auto say = [&](const std::string& line) {
    if (log) log(fmt::format("{}: {}", c.folder.folder.string(), line));
  };
  const bool usable = precision.fp8 && precision.recipe == Recipe::kBlockwise &&
                      (!precision.weight_pow2 || c.folder.fp8->ue8m0);
  if (precision.fp8 && !usable) {
    say("the file's FP8 codes have blocks of 128 x 128 with other scales than this precision asks "
        "for; they are dequantized to BF16 and quantized again");
    return q;
  }
  std::size_t taken = 0, dequantized = 0, quantized = 0, heads = 0;  // projections
  for (std::size_t p = 0; p < c.parts.size(); ++p) {
    const std::size_t stored = count_fp8(c.parts[p]);
    if (c.table.params[p].kind == ParamKind::kHeads) {
      if (stored == 0) continue;
      ++heads;
      if (precision.fp8) keep_stored(c.parts[p][0], p, *q);
      continue;
    }
    if (!q->fp8[p]) {
      dequantized += stored;
      continue;
    }
    quantized += c.parts[p].size() - stored;
    taken += stored;
    const Param& param = c.table.params[p];
    for (std::size_t begin = 0, end; stored != 0 && begin < param.parts.size(); begin = end) {
      for (end = begin;
           end < param.parts.size() && param.parts[end].expert == param.parts[begin].expert;)
        ++end;
      import_expert(ctx, c.parts[p], param, param.parts[begin].expert, begin, end, q->forward[p],
                    q->transposed[p]);
    }
  }
  if (dequantized > 0)
    say(fmt::format("{} of {} FP8 tensors run in BF16 in this precision, dequantized", dequantized,
                    dequantized + taken));
  if (heads > 0)
    say(fmt::format(
        "kv_b_proj of {} layers is FP8 in the file and runs in BF16, dequantized, as in "
        "every precision",
        heads));
  if (quantized > 0)
    say(fmt::format("{} tensors that the file has in BF16 run in FP8 in this precision, quantized",
                    quantized));
  return q;
}

void import_folder_fp8(const Context& ctx, const std::filesystem::path& folder, Weights& weights,
                       const Precision& precision, const Log& log) {
  const auto file = folder / "config.json";
  if (!parse_fp8_format(read_json_file(file), file.string())) return;
  import_fp8(ctx, open_checkpoint(folder), weights, precision, log);
}

std::vector<std::int64_t> scale_shape(const ParamPart& part) {
  return {blocks(part.rows), blocks(part.columns)};
}

void export_codes(const Context& ctx, const ops::Fp8Weight& w, const ParamPart& part, Fp8* to) {
  const std::int64_t N = w.codes_ENK.dim(1), K = w.codes_ENK.dim(2);
  const TensorView rows =
      w.codes_ENK.reshape({w.codes_ENK.dim(0) * N, K}).rows(part.expert * N + part.row, part.rows);
  std::vector<Fp8> host(rows.bytes());
  tensor::download(ctx, rows, host.data());
  for (std::int64_t r = 0; r < part.rows; ++r)
    std::memcpy(to + r * part.columns, host.data() + r * K, static_cast<std::size_t>(part.columns));
}

void export_scales(const Context& ctx, const ops::Fp8Weight& w, const ParamPart& part, float* to) {
  const std::int64_t rows = blocks(part.rows), columns = blocks(part.columns);
  const std::int64_t NB = w.scales.dim(1), KB = w.scales.dim(2);
  LOCKSTEP_CHECK(columns == KB, "{}: {} columns of scales in a slab of {}", part.hf_name, columns,
                 KB);
  const TensorView grid =
      w.scales.reshape({w.scales.dim(0) * NB, KB}).rows(part.expert * NB + part.row / kBlock, rows);
  tensor::download(ctx, grid, to);
}

void store_scales(const std::vector<float>& scales, FileDtype dtype, const std::string& name,
                  std::span<std::byte> to) {
  LOCKSTEP_CHECK(to.size() == scales.size() * dtype_item_bytes(dtype), "{}: {} bytes for {} scales",
                 name, to.size(), scales.size());
  if (dtype == FileDtype::kF32) {
    std::memcpy(to.data(), scales.data(), to.size());
    return;
  }
  for (std::size_t i = 0; i < scales.size(); ++i) {
    bool exact = false;
    if (dtype == FileDtype::kBF16) {
      const numerics::Bf16 value = numerics::to_bf16(scales[i]);
      exact = numerics::to_float(value) == scales[i];
      std::memcpy(to.data() + 2 * i, &value, 2);
    } else if (dtype == FileDtype::kF8E8M0) {
      int exponent = 0;
      exact = std::frexp(scales[i], &exponent) == 0.5f;
      to[i] = static_cast<std::byte>(exponent - 1 + 127);
    }
    if (!exact)
      fail<InputError>("tensor '{}': the scale {} does not fit {} exactly; store scales as F32",
                       name, scales[i], dtype_name(dtype));
  }
}

}  // namespace lockstep::model
