#include "tensor/op_profile.h"

#include <vector>

#ifdef LOCKSTEP_HAVE_CUDA
#include "tensor/cuda_check.h"
#endif

namespace lockstep::tensor {

#ifdef LOCKSTEP_HAVE_CUDA

struct OpProfile::Events {
  struct Call {
    const char* op;
    cudaEvent_t begin, end;
  };
  std::vector<Call> calls;
  std::vector<cudaEvent_t> spare;
  int depth = 0;

  cudaEvent_t take() {
    cudaEvent_t event = nullptr;
    if (spare.empty()) {
      check_cuda(cudaEventCreate(&event), "event");
    } else {
      event = spare.back();
      spare.pop_back();
    }
    return event;
  }
};

OpProfile::OpProfile() : events_(std::make_unique<Events>()) {}

OpProfile::~OpProfile() {
  for (const Events::Call& call : events_->calls)
    cudaEventDestroy(call.begin), cudaEventDestroy(call.end);
  for (const cudaEvent_t event : events_->spare) cudaEventDestroy(event);
}

void OpProfile::begin(const Context& ctx, const char* op) {
  if (events_->depth++ > 0) return;
  events_->calls.push_back({op, events_->take(), events_->take()});
  check_cuda(cudaEventRecord(events_->calls.back().begin, stream_of(ctx)), "event");
}

void OpProfile::end(const Context& ctx) {
  if (--events_->depth > 0) return;
  cudaEventRecord(events_->calls.back().end, stream_of(ctx));  // no throw from a destructor
}

std::map<std::string, OpProfile::Time> OpProfile::collect(const Context& ctx) {
  check_cuda(cudaStreamSynchronize(stream_of(ctx)), "work on the GPU");
  std::map<std::string, Time> times;
  for (const Events::Call& call : events_->calls) {
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, call.begin, call.end), "event");
    Time& t = times[call.op];
    t.seconds += ms * 1e-3;
    ++t.calls;
    events_->spare.push_back(call.begin);
    events_->spare.push_back(call.end);
  }
  events_->calls.clear();
  return times;
}

#else

struct OpProfile::Events {};
OpProfile::OpProfile() = default;
OpProfile::~OpProfile() = default;
void OpProfile::begin(const Context&, const char*) {}
void OpProfile::end(const Context&) {}
std::map<std::string, OpProfile::Time> OpProfile::collect(const Context&) { return {}; }

#endif

}  // namespace lockstep::tensor
