// Time on the GPU by op, from events around each call. Off unless a context carries a profile.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "tensor/tensor.h"

namespace lockstep::tensor {

// Calls that are timed, until they are collected.
class OpProfile {
 public:
  OpProfile();
  ~OpProfile();
  OpProfile(const OpProfile&) = delete;
  OpProfile& operator=(const OpProfile&) = delete;

  struct Time {
    double seconds = 0;
    std::int64_t calls = 0;
  };
  // Sums by op since the last call. Waits for the context's work.
  std::map<std::string, Time> collect(const Context& ctx);

  void begin(const Context& ctx, const char* op);
  void end(const Context& ctx);

 private:
  struct Events;
  std::unique_ptr<Events> events_;
};

// Times the calls of a scope where the context has a profile. An op inside an op counts as part of
// the outer one.
class OpTimer {
 public:
  OpTimer(const Context& ctx, const char* op) : ctx_(ctx) {
    if (ctx.profile != nullptr) ctx.profile->begin(ctx, op);
  }
  ~OpTimer() {
    if (ctx_.profile != nullptr) ctx_.profile->end(ctx_);
  }
  OpTimer(const OpTimer&) = delete;
  OpTimer& operator=(const OpTimer&) = delete;

 private:
  const Context& ctx_;
};

}  // namespace lockstep::tensor
