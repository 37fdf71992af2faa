#include "tensor/graph.h"

#ifdef LOCKSTEP_HAVE_CUDA
#include "tensor/cuda_check.h"
#endif

namespace lockstep::tensor {

#ifdef LOCKSTEP_HAVE_CUDA

Graph Graph::record(const Context& ctx, const std::function<void()>& work) {
  const cudaStream_t stream = stream_of(ctx);
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "graph");
  cudaGraph_t recorded = nullptr;
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(stream, &recorded);
    if (recorded != nullptr) cudaGraphDestroy(recorded);
    throw;
  }
  check_cuda(cudaStreamEndCapture(stream, &recorded), "graph");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, recorded, 0);
  cudaGraphDestroy(recorded);
  check_cuda(status, "graph");
  Graph g;
  g.graph_ = std::shared_ptr<void>(
      executable, [](void* p) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(p)); });
  return g;
}

void Graph::launch(const Context& ctx) const {
  check_cuda(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph_.get()), stream_of(ctx)), "graph");
}

#else

Graph Graph::record(const Context&, const std::function<void()>&) {
  base::fail<base::ContractError>("graphs are for GPUs; this build has no CUDA backend");
}

void Graph::launch(const Context&) const {}

#endif

}  // namespace lockstep::tensor
