// Decode steps as recorded GPU work: every running sequence gets one token. A graph serves all
// steps of its size; smaller batches are filled up with rows that belong to no sequence. The tokens
// are those of the same step without a graph (docs/numerics.md: nothing depends on the batch).
#pragma once

#include <map>

#include "rollout/batch.h"
#include "tensor/graph.h"

namespace lockstep::rollout {

class DecodeGraphs {
 public:
  // Whether the plan is one that a graph can run: on a GPU, every item one token that is drawn from
  // by its own sequence alone.
  static bool fits(const tensor::Context& ctx, const StepPlan& plan);

  // Runs the plan's forward and draws. The first step of a size runs without a graph (code is
  // loaded and memory taken then), the second records it.
  void run(const tensor::Context& ctx, const model::ModelView& model, const StepPlan& plan,
           const Options& options, model::KvCache& cache, Sampled& out);

  // After the model's or the cache's memory moved.
  void clear() { graphs_.clear(); }

 private:
  struct Step {
    bool warm = false;
    tensor::Graph graph;
  };
  std::map<std::pair<std::int64_t, std::int64_t>, Step> graphs_;  // by rows and pages a row
  tensor::Tensor input_, output_;                                 // on the device
  tensor::Arena arena_;  // what the recorded work uses; nobody else takes from it
};

}  // namespace lockstep::rollout
