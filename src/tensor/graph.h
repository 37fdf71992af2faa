// Recorded GPU work that is launched as one piece (a CUDA graph).
#pragma once

#include <functional>
#include <memory>

#include "tensor/tensor.h"

namespace lockstep::tensor {

class Graph {
 public:
  Graph() = default;
  explicit operator bool() const { return graph_ != nullptr; }

  // Records what `work` launches on the context's stream; nothing runs. The work must neither wait
  // for the device nor allocate, and the memory that it uses must stay where it is for as long as
  // the graph is launched. Contents may change: weights are read anew at every launch.
  static Graph record(const Context& ctx, const std::function<void()>& work);
  void launch(const Context& ctx) const;

 private:
  std::shared_ptr<void> graph_;
};

}  // namespace lockstep::tensor
