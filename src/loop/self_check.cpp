#include <fmt/format.h>

#include <cstring>

#include "loop/doctor.h"
#include "numerics/tensor_core.h"
#include "ops/gemm.h"

namespace lockstep::loop {

using numerics::Fp8;
using numerics::StepKind;
using numerics::Term;
using tensor::DType;
using tensor::Isa;
using tensor::Shape;
using tensor::Tensor;

namespace {

// One step of c + sum of `count` products of 2^a and 2^b, as powers of two show where bits are cut.
float step_of(const StepKind& kind, int count, int a, int b, float c) {
  Term left[32] = {}, right[32] = {};
  const int fraction = kind.product_fraction / 2;
  for (int i = 0; i < kind.terms; ++i) left[i] = right[i] = {0, 0, false, true};
  for (int i = 0; i < count; ++i) {
    left[i] = {1 << fraction, a, false, true};
    right[i] = {1 << fraction, b, false, true};
  }
  return numerics::tensor_core_step(kind, left, right, c);
}

struct Answer {
  const char* what;
  const StepKind& kind;
  int count, a, b;
  float c, expected;
};

Finding known_answers() {
  using numerics::kBf16Step;
  using numerics::kE4m3Step;
  // Worked by hand from section 4: E4M3 aligns to 13 bits below the largest exponent and truncates
  // each term; BF16 aligns to 25 bits and truncates the sum to 23.
  const Answer answers[] = {
      {"E4M3 keeps 2^-13 beside 1", kE4m3Step, 1, -6, -7, 1.0f, 1.0f + 0x1p-13f},
      {"E4M3 drops 2^-14 beside 1", kE4m3Step, 1, -7, -7, 1.0f, 1.0f},
      {"E4M3 drops each of 32 times 2^-14", kE4m3Step, 32, -7, -7, 1.0f, 1.0f},
      {"E4M3 sums 32 times 1 exactly", kE4m3Step, 32, 0, 0, 0.0f, 32.0f},
      {"BF16 sums two times 2^-24 beside 1", kBf16Step, 2, -12, -12, 1.0f, 1.0f + 0x1p-23f},
      {"BF16 truncates 1 + 2^-24", kBf16Step, 1, -12, -12, 1.0f, 1.0f},
  };
  for (const Answer& x : answers) {
    const float got = step_of(x.kind, x.count, x.a, x.b, x.c);
    if (std::memcmp(&got, &x.expected, sizeof(got)) != 0)
      return {
          "self-check", "tensor-core step",
          fmt::format("wrong: {} gives {:a}, must be {:a}. Rebuild with the project's own flags "
                      "(no -ffast-math)",
                      x.what, got, x.expected),
          true};
  }
  return {"self-check", "tensor-core step",
          fmt::format("{} worked answers right", std::size(answers))};
}

// Bytes from the counter-based generator; as E4M3 codes without the two NaNs, as BF16 values in
// +-[0.5, 2).
Tensor random_codes(const Shape& shape, DType dtype, std::uint64_t stream) {
  Tensor out(tensor::Device::kCpu, dtype, shape);
  for (std::int64_t i = 0; i < shape.count(); ++i) {
    const std::uint32_t word = static_cast<std::uint32_t>(
        (static_cast<std::uint64_t>(i) + 1) * 0x9E3779B97F4A7C15ull * (2 * stream + 1) >> 32);
    if (dtype == DType::kE4m3) {
      const Fp8 code = static_cast<Fp8>(word >> 24);
      out.view().fp8()[i] = (code & 0x7F) == 0x7F ? Fp8{0x40} : code;
    } else if (dtype == DType::kBf16) {
      out.as<numerics::Bf16>()[i] = {
          static_cast<std::uint16_t>((word >> 31 << 15) | 0x3F00 | (word >> 16 & 0xFF))};
    } else {
      out.as<float>()[i] = 0.5f + static_cast<float>(word >> 8) * 0x1p-24f;
    }
  }
  return out;
}

constexpr std::int64_t kM = 37, kN = 130, kK = 300;

// The FP8 and the BF16 product, one after the other in one buffer.
Tensor products(Isa isa, int threads) {
  tensor::Arena arena;
  tensor::Context ctx = tensor::cpu_context(arena, threads);
  ctx.isa = isa;
  Tensor out(tensor::Device::kCpu, DType::kFp32, {2 * kM, kN});
  const Tensor a = random_codes({kM, kK}, DType::kE4m3, 1);
  const Tensor a_scale = random_codes({3, kM}, DType::kFp32, 2);
  const Tensor b = random_codes({1, kN, kK}, DType::kE4m3, 3);
  const Tensor b_scale = random_codes({1, 2, 3}, DType::kFp32, 4);
  ops::fp8_gemm(ctx, {a, a_scale, ops::Scaling::kBlock}, {b, b_scale, ops::Scaling::kBlock}, {},
                out.view().rows(0, kM));
  const Tensor a16 = random_codes({kM, kK}, DType::kBf16, 5);
  const Tensor b16 = random_codes({1, kN, kK}, DType::kBf16, 6);
  ops::bf16_gemm(ctx, a16, b16, ops::BLayout::kNK, {}, out.view().rows(kM, kM));
  return out;
}

Finding equal_products() {
  const Tensor portable = products(Isa::kPortable, 1);
  std::string compared;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (!tensor::isa_supported(isa)) continue;
    for (const int threads : {1, 2}) {
      const Tensor other = products(isa, threads);
      if (std::memcmp(portable.view().data, other.view().data, portable.view().bytes()) != 0)
        return {"self-check", "products on all code paths",
                fmt::format("{} with {} threads differs from portable with one: the processor or "
                            "the build is at fault. LOCKSTEP_CPU_ISA=portable avoids it",
                            tensor::isa_name(isa), threads),
                true};
    }
    compared += (compared.empty() ? "" : ", ") + std::string(tensor::isa_name(isa));
  }
  return {"self-check", "products on all code paths",
          fmt::format("FP8 and BF16 equal by bytes on {}, 1 and 2 threads", compared)};
}

}  // namespace

std::vector<Finding> self_check() { return {known_answers(), equal_products()}; }

}  // namespace lockstep::loop
