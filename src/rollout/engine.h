// Generation: takes requests, runs batches, returns trajectories. The scheduler decides, the engine
// runs. Tokens and log-probabilities of a request are a function of the request and the weights
// (docs/numerics.md): what else is in flight, the options, preemption and threads do not show.
// Weights that give logits without a meaning give NaN log-probabilities (ops/vocab.h); whoever
// trains on them looks.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "model/forward.h"
#include "rollout/batch.h"
#include "rollout/decode_graphs.h"
#include "rollout/ending.h"
#include "rollout/request_check.h"
#include "rollout/scheduler.h"

namespace lockstep::rollout {

// Sums since the engine was made.
struct EngineStats {
  std::int64_t steps = 0;                 // forwards
  std::int64_t prefill_tokens = 0;        // computed: prompts, and tokens again after preemption
  std::int64_t decode_tokens = 0;         // computed one at a time
  std::int64_t generated_tokens = 0;      // sampled
  std::int64_t shared_prefix_tokens = 0;  // not computed because another sequence had them
  std::int64_t page_copies = 0;
  std::int64_t preemptions = 0;
  std::int64_t peak_pages = 0;
  std::int64_t graph_steps = 0;  // of them decodes by graph
  double seconds = 0;            // in step()
};

struct Finished {
  std::int64_t id = 0;
  data::Trajectory trajectory;
};

struct Progress {
  std::int64_t finished = 0, total = 0;  // requests
  std::int64_t tokens = 0;               // sampled so far
};

class Engine {
 public:
  // The context's workspace must outlive the engine. Options that cannot be are an InputError.
  Engine(const tensor::Context& ctx, const Options& options, Detokenize detokenize);

  // The weights to sample with from now on. The view's memory stays the caller's and must not
  // change while requests are unfinished; there must be none here. InputError where max_model_len
  // exceeds the model's positions.
  void set_model(const model::ModelView& model, std::uint64_t version);

  // The request's id, for abort and Finished. InputError: rollout/request_check.h. Stop tokens are
  // those of the request; the engine adds none.
  std::int64_t submit(Request request);

  // Runs one batch; false when nothing was left to run. When a batch throws, all unfinished
  // requests are dropped.
  bool step();

  // Ends a request where it is, with FinishReason::kAbort and what it has; false if it is not in
  // flight.
  bool abort(std::int64_t id);

  // Requests that ended since the last call, in the order of their end.
  std::vector<Finished> take_finished();

  // All requests to their end; trajectories in the order of the requests. Either all requests are
  // accepted or, with an InputError, none. What on_progress (called after every batch) throws
  // passes through, and the requests are dropped. on_token is called for every sampled token, also
  // the one that ends an answer, with the request's place among `requests`.
  std::vector<data::Trajectory> generate(
      std::vector<Request> requests,
      const std::function<void(const Progress&)>& on_progress = nullptr,
      const std::function<void(std::int64_t, std::int32_t)>& on_token = nullptr);

  std::int64_t unfinished() const { return static_cast<std::int64_t>(sequences_.size()); }
  // The options with the model's values in place of 0.
  const Options& options() const { return options_; }
  EngineStats stats() const;
  std::size_t cache_bytes() const;  // keys and values of all layers

 private:
  void run_batch();
  void run_eagerly();
  void accept(const Draw& draw, std::int32_t token, float logprob);
  void finish(Sequence& sequence, Ending ending);
  void drop_all();
  RequestLimits limits() const;

  tensor::Context ctx_;
  Options wanted_, options_;
  Detokenize detokenize_;
  std::function<void(std::int64_t id, std::int32_t token)> on_token_;  // during generate
  model::ModelView model_;
  std::uint64_t version_ = 0;
  model::KvCache cache_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unordered_map<std::int64_t, std::unique_ptr<Sequence>> sequences_;  // unfinished
  std::vector<Finished> finished_;
  std::int64_t next_id_ = 0;
  EngineStats stats_;
  StepPlan plan_;  // kept for their memory
  Sampled sampled_;
  DecodeGraphs graphs_;
};

}  // namespace lockstep::rollout
