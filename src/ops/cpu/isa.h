// How an op reaches its CPU implementation. Every file of ops/cpu/ is compiled three times, each
// time in the namespace lockstep::ops::cpu::<portable|avx2|avx512>; LOCKSTEP_CPU_CALL picks one by
// the context's instruction set. NOTE: keep std containers and other shared inline code out of the
// hot paths of ops/cpu: the linker may keep the AVX-512 copy of an inline function for all callers.
#pragma once

#include "tensor/tensor.h"

#ifndef LOCKSTEP_ISA
#define LOCKSTEP_ISA portable
#endif

// Declares `signature` in the three namespaces: LOCKSTEP_CPU_DECLARE(void f(const Context&, int);)
#if defined(__x86_64__)
#define LOCKSTEP_CPU_DECLARE(...) \
  namespace portable {            \
  __VA_ARGS__                     \
  }                               \
  namespace avx2 {                \
  __VA_ARGS__                     \
  }                               \
  namespace avx512 {              \
  __VA_ARGS__                     \
  }
#define LOCKSTEP_CPU_CALL(ctx, function, ...)                                         \
  ((ctx).isa == ::lockstep::tensor::Isa::kAvx512 ? cpu::avx512::function(__VA_ARGS__) \
   : (ctx).isa == ::lockstep::tensor::Isa::kAvx2 ? cpu::avx2::function(__VA_ARGS__)   \
                                                 : cpu::portable::function(__VA_ARGS__))
#else
#define LOCKSTEP_CPU_DECLARE(...) \
  namespace portable {            \
  __VA_ARGS__                     \
  }
#define LOCKSTEP_CPU_CALL(ctx, function, ...) cpu::portable::function(__VA_ARGS__)
#endif
