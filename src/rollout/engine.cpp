#include "rollout/engine.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/error.h"
#include "tensor/device.h"

namespace lockstep::rollout {

using base::fail;
using base::InputError;
using data::FinishReason;
using model::ModelConfig;
using tensor::ArenaScope;
using tensor::Context;
using tensor::DType;
using tensor::TensorView;

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void check_options(const Options& o) {
  const auto at_least = [](const char* name, std::int64_t value, std::int64_t least) {
    if (value < least)
      fail<InputError>("rollout: {} is {}; it must be at least {}", name, value, least);
  };
  at_least("max_num_seqs", o.max_num_seqs, 1);
  at_least("block_size", o.block_size, 1);
  at_least("num_blocks", o.num_blocks, 0);
  at_least("max_num_batched_tokens", o.max_num_batched_tokens, 1);
  at_least("prefill_chunk", o.prefill_chunk, 0);
  at_least("max_model_len", o.max_model_len, 0);
}

// Puts the model's values in place of 0.
Options resolve(Options o, const ModelConfig& c) {
  if (o.max_model_len == 0) o.max_model_len = c.max_positions;
  if (o.max_model_len > c.max_positions)
    fail<InputError>("rollout: max_model_len is {}, but the model has {} positions; lower it",
                     o.max_model_len, c.max_positions);
  const std::int64_t sequence = (o.max_model_len + o.block_size - 1) / o.block_size;
  const std::int64_t row_bytes = model::kv_row_bytes(c);
  if (o.num_blocks == 0)
    o.num_blocks = std::max(sequence, std::min(sequence * o.max_num_seqs,
                                               o.kv_cache_bytes / (row_bytes * o.block_size)));
  if (o.num_blocks > std::int64_t{0x7FFFFFFF} / o.block_size)
    fail<InputError>("rollout: num_blocks {} times block_size {} is beyond 2^31 tokens; lower one",
                     o.num_blocks, o.block_size);
  return o;
}

model::KvCache make_cache(const Context& ctx, const Options& o, const ModelConfig& c) {
  model::KvCache cache = model::make_kv_cache(ctx, c, o.num_blocks * o.block_size);
  if (o.shuffle_pages == 0) return cache;
  for (const auto* tensors : {&cache.k, &cache.v})
    for (const tensor::Tensor& t : *tensors) tensor::fill_bytes(ctx, t, 0xFF);  // BF16 NaN
  return cache;
}

}  // namespace

Engine::Engine(const Context& ctx, const Options& options, Detokenize detokenize)
    : ctx_(ctx), wanted_(options), options_(options), detokenize_(std::move(detokenize)) {
  LOCKSTEP_CHECK(ctx.workspace != nullptr && detokenize_ != nullptr,
                 "an engine needs a workspace and a detokenizer");
  check_options(options);
}

void Engine::set_model(const model::ModelView& model, std::uint64_t version) {
  LOCKSTEP_CHECK(sequences_.empty(), "set_model with {} unfinished requests", sequences_.size());
  const ModelConfig& c = model.weights->config;
  const Options resolved = resolve(wanted_, c);
  const std::int64_t rows = resolved.num_blocks * resolved.block_size;
  const bool fits = scheduler_ != nullptr && options_.max_model_len == resolved.max_model_len &&
                    model::cache_fits(cache_, c, rows);
  if (model.weights != model_.weights || model.quantized != model_.quantized) graphs_.clear();
  model_ = model;
  version_ = version;
  if (fits) return;
  stats_ = stats();  // keeps the counts of the scheduler that goes
  scheduler_.reset();
  options_ = resolved;
  graphs_.clear();
  cache_ = make_cache(ctx_, options_, c);
  scheduler_ = std::make_unique<Scheduler>(options_);
}

RequestLimits Engine::limits() const {
  LOCKSTEP_CHECK(scheduler_ != nullptr, "set_model comes before requests");
  return {model_.weights->config.vocab_size, options_.max_model_len, options_.num_blocks,
          options_.block_size};
}

std::int64_t Engine::submit(Request request) {
  const RequestLimits limit = limits();
  check_request(request, limit);
  auto owned = std::make_unique<Sequence>();
  Sequence& s = *owned;
  s.id = next_id_++;
  s.request = std::move(request);
  s.prompt_length = static_cast<std::int64_t>(s.request.prompt.size());
  s.max_length = max_length(s.request, limit);
  s.tokens.reserve(s.max_length);
  s.tokens = s.request.prompt;
  s.logprobs.reserve(s.max_length - s.prompt_length);
  sequences_.emplace(s.id, std::move(owned));
  const std::int64_t id = s.id;
  if (s.max_length > s.prompt_length)
    scheduler_->add(s);
  else
    finish(s, {FinishReason::kLength, detokenize_({})});
  return id;
}

bool Engine::step() {
  if (sequences_.empty()) return false;
  const double start = now();
  try {
    run_batch();
  } catch (...) {
    drop_all();
    throw;
  }
  stats_.seconds += now() - start;
  return true;
}

void Engine::run_batch() {
  ArenaScope scratch(*ctx_.workspace);
  scheduler_->schedule(plan_);
  LOCKSTEP_CHECK(plan_.tokens > 0, "{} unfinished requests but nothing to run", sequences_.size());
  for (const StepItem& item : plan_.items) {
    const bool decode = item.begin >= item.sequence->prompt_length && item.count == 1 &&
                        item.begin + 1 == item.sequence->length();
    (decode ? stats_.decode_tokens : stats_.prefill_tokens) += item.count;
  }
  ++stats_.steps;
  copy_pages(ctx_, plan_, options_.block_size, cache_);
  if (!options_.enforce_eager && DecodeGraphs::fits(ctx_, plan_)) {
    graphs_.run(ctx_, model_, plan_, options_, cache_, sampled_);
    ++stats_.graph_steps;
  } else {
    run_eagerly();
  }
  scheduler_->commit(plan_);
  for (std::size_t i = 0; i < plan_.draws.size(); ++i)
    accept(plan_.draws[i], sampled_.tokens[i], sampled_.stats[i].logprob);
}

void Engine::run_eagerly() {
  const model::ForwardBatch batch = make_batch(ctx_, plan_, options_.block_size);
  const TensorView hidden_TD =
      ctx_.workspace->take(DType::kBf16, {plan_.tokens, model_.weights->config.hidden_size});
  model::forward(ctx_, model_, batch, &cache_, nullptr, hidden_TD);
  sample_draws(ctx_, model_, plan_, hidden_TD, sampled_);
}

void Engine::accept(const Draw& draw, std::int32_t token, float logprob) {
  Sequence& s = *draw.sequence;
  LOCKSTEP_CHECK(token >= 0 && token < model_.weights->config.vocab_size,
                 "request {}: sampled token {} is outside the vocabulary", s.id, token);
  s.tokens.push_back(token);
  s.logprobs.push_back(logprob);
  ++stats_.generated_tokens;
  if (on_token_) on_token_(s.id, token);
  if (auto end = ending(s, detokenize_)) finish(s, std::move(*end));
}

void Engine::finish(Sequence& sequence, Ending ending) {
  scheduler_->finish(sequence);
  Finished f;
  f.id = sequence.id;
  data::Trajectory& t = f.trajectory;
  t.prompt_id = sequence.request.prompt_id;
  t.sample = sequence.request.sample;
  t.response = response(sequence);
  t.prompt = std::move(sequence.request.prompt);
  t.logprobs = std::move(sequence.logprobs);
  t.finish = ending.reason;
  t.weight_version = version_;
  t.text = std::move(ending.text);
  finished_.push_back(std::move(f));
  sequences_.erase(sequence.id);
}

bool Engine::abort(std::int64_t id) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end()) return false;
  finish(*it->second, {FinishReason::kAbort, detokenize_(response(*it->second))});
  return true;
}

void Engine::drop_all() {
  for (const auto& [id, sequence] : sequences_) scheduler_->finish(*sequence);
  sequences_.clear();
}

std::vector<Finished> Engine::take_finished() { return std::exchange(finished_, {}); }

std::vector<data::Trajectory> Engine::generate(
    std::vector<Request> requests, const std::function<void(const Progress&)>& on_progress,
    const std::function<void(std::int64_t, std::int32_t)>& on_token) {
  const RequestLimits limit = limits();
  for (const Request& request : requests) check_request(request, limit);
  Progress progress;
  progress.total = static_cast<std::int64_t>(requests.size());
  const std::int64_t first = next_id_, tokens = stats_.generated_tokens;
  std::vector<data::Trajectory> out(requests.size());
  const auto collect = [&] {
    std::erase_if(finished_, [&](Finished& f) {
      if (f.id < first || f.id >= first + progress.total) return false;
      out[f.id - first] = std::move(f.trajectory);
      ++progress.finished;
      return true;
    });
  };
  struct Listening {
    Engine& engine;
    ~Listening() { engine.on_token_ = nullptr; }
  } listening{*this};
  if (on_token)
    on_token_ = [&](std::int64_t id, std::int32_t token) {
      if (id >= first && id < first + progress.total) on_token(id - first, token);
    };
  try {
    for (Request& request : requests) submit(std::move(request));
    collect();
    while (progress.finished < progress.total) {
      const bool ran = step();
      collect();
      LOCKSTEP_CHECK(ran || progress.finished == progress.total, "{} of {} requests were lost",
                     progress.total - progress.finished, progress.total);
      progress.tokens = stats_.generated_tokens - tokens;
      if (on_progress) on_progress(progress);
    }
  } catch (...) {
    drop_all();
    collect();
    throw;
  }
  return out;
}

std::size_t Engine::cache_bytes() const { return cache_.bytes(); }

EngineStats Engine::stats() const {
  EngineStats s = stats_;
  if (scheduler_ == nullptr) return s;
  s.shared_prefix_tokens += scheduler_->stats().shared_tokens;
  s.page_copies += scheduler_->stats().page_copies;
  s.preemptions += scheduler_->stats().preemptions;
  s.peak_pages = std::max(s.peak_pages, scheduler_->pages().peak());
  return s;
}

}  // namespace lockstep::rollout
