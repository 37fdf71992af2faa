#include <cuda_runtime_api.h>

#include <cstdlib>

#include "gpu/gpu_test.h"
#include "ops/cuda/gemm_plan.h"
#include "ops/gemm.h"

namespace lockstep::ops::test {
namespace {

struct Counts {
  std::vector<std::int32_t> rows;  // of each expert
  bool grouped = true;             // with offsets
};

struct Case {
  Tensor a, b, sa, sb, offsets;
  Scaling scaling;
};

// Every code but the non-finite ones, evenly: all exponents meet in every step.
Tensor random_codes(Rng& rng, DType dtype, const Shape& shape) {
  Tensor out = empty(dtype, shape);
  auto* p = out.view().fp8();
  const int first_nonfinite = dtype == DType::kE4m3 ? 0x7F : 0x7C;
  std::uint64_t bits = 0;
  for (std::int64_t i = 0; i < shape.count(); ++i, bits >>= 8) {
    if (i % 8 == 0) bits = rng();
    const int code = static_cast<int>(bits & 0xFF);
    p[i] = static_cast<std::uint8_t>((code & 0x7F) >= first_nonfinite ? code & 0x8F : code);
  }
  return out;
}

Tensor random_scales(Rng& rng, const Shape& shape) {
  Tensor out = empty(DType::kFp32, shape);
  for (std::int64_t i = 0; i < shape.count(); ++i)
    out.as<float>()[i] = static_cast<float>(
        std::ldexp(uniform(rng, 1.0, 2.0), static_cast<int>(uniform_int(rng, -12, 3))));
  return out;
}

Case make_case(Rng& rng, std::int64_t N, std::int64_t K, const Counts& counts, Scaling scaling,
               DType a_type = DType::kE4m3, DType b_type = DType::kE4m3) {
  const auto E = static_cast<std::int64_t>(counts.rows.size());
  std::vector<std::int32_t> offsets{0};
  for (const std::int32_t rows : counts.rows) offsets.push_back(offsets.back() + rows);
  const std::int64_t M = offsets.back(), G = (K + 127) / 128;
  const bool block = scaling == Scaling::kBlock;
  return {random_codes(rng, a_type, {M, K}),
          random_codes(rng, b_type, {E, N, K}),
          random_scales(rng, block ? Shape{G, M} : Shape{M}),
          random_scales(rng, block ? Shape{E, (N + 127) / 128, G} : Shape{E, N}),
          counts.grouped ? int32_tensor(offsets) : Tensor{},
          scaling};
}

class GemmFp8Gpu : public GpuTest {
 protected:
  void TearDown() override {
    unsetenv("LOCKSTEP_PLAN");
    GpuTest::TearDown();
  }

  void expect_same_on_all_plans(const Case& c, DType out) {
    if (left_out(3)) return;
    const Shape shape{c.a.view().dim(0), c.b.view().dim(1)};
    const Tensor expected = cpu_output(out, shape);
    fp8_gemm(cpu, {c.a, c.sa, c.scaling}, {c.b, c.sb, c.scaling}, c.offsets, expected);
    const Fp8Rows a{on_gpu(c.a), on_gpu(c.sa), c.scaling};
    const Fp8Weight b{on_gpu(c.b), on_gpu(c.sb), c.scaling};
    const TensorView offsets = on_gpu(c.offsets);
    for (const std::string& plan : cuda::gemm_plan_names()) {
      setenv("LOCKSTEP_PLAN", plan.c_str(), 1);
      const TensorView found = gpu_output(out, shape);
      fp8_gemm(gpu, a, b, offsets, found);
      expect_same(expected, found,
                  fmt::format("plan {} {} E {} M {} N {} K {}", plan,
                              c.scaling == Scaling::kBlock ? "block" : "row", c.b.view().dim(0),
                              shape[0], shape[1], c.b.view().dim(2)));
    }
    unsetenv("LOCKSTEP_PLAN");
  }
  void expect_same_on_all_plans(const Case& c) {
    expect_same_on_all_plans(c, DType::kBf16);
    expect_same_on_all_plans(c, DType::kFp32);
  }
};

constexpr Scaling kScalings[] = {Scaling::kBlock, Scaling::kRow};

TEST_F(GemmFp8Gpu, RowsAroundTheTiles) {
  Rng rng(1);
  for (const Scaling scaling : kScalings)
    for (const std::int32_t M : {0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 191, 193, 256, 257, 521})
      expect_same_on_all_plans(make_case(rng, 144, 272, {{M}, false}, scaling), DType::kBf16);
}

TEST_F(GemmFp8Gpu, ColumnsAroundTheTiles) {
  Rng rng(2);
  for (const Scaling scaling : kScalings)
    for (const std::int64_t N : {0, 16, 48, 112, 128, 144, 160, 192, 208, 320, 400, 1008})
      expect_same_on_all_plans(make_case(rng, N, 128, {{67}, false}, scaling));
}

TEST_F(GemmFp8Gpu, Contractions) {
  Rng rng(3);
  for (const Scaling scaling : kScalings)
    for (const std::int64_t K : {0, 16, 32, 48, 112, 128, 144, 256, 1040, 2048})
      expect_same_on_all_plans(make_case(rng, 176, K, {{19, 0, 131}}, scaling));
}

TEST_F(GemmFp8Gpu, Experts) {
  Rng rng(4);
  std::vector<std::int32_t> many;
  for (int e = 0; e < 257; ++e) many.push_back(static_cast<std::int32_t>(rng() % 7 * (rng() % 7)));
  for (const Scaling scaling : kScalings) {
    expect_same_on_all_plans(
        make_case(rng, 304, 400, {{0, 1, 0, 64, 65, 0, 300, 7, 129, 700, 0}}, scaling));
    expect_same_on_all_plans(make_case(rng, 48, 144, {{0, 0, 0}}, scaling));
    expect_same_on_all_plans(make_case(rng, 112, 176, {many}, scaling), DType::kBf16);
  }
}

// Far more tiles than multiprocessors: every CTA takes several, over several experts.
TEST_F(GemmFp8Gpu, ManyTiles) {
  Rng rng(5);
  for (const Scaling scaling : kScalings)
    expect_same_on_all_plans(make_case(rng, 3008, 144, {{900, 3, 0, 2300, 40, 1100}}, scaling),
                             DType::kBf16);
}

TEST_F(GemmFp8Gpu, ModelWidths) {
  Rng rng(6);
  const Counts few{{2, 0, 5, 1, 8, 17, 4, 33}};
  expect_same_on_all_plans(make_case(rng, 1536, 2048, few, Scaling::kBlock), DType::kBf16);
  expect_same_on_all_plans(make_case(rng, 2048, 768, few, Scaling::kBlock), DType::kBf16);
  expect_same_on_all_plans(make_case(rng, 4096, 7168, {{70, 0, 9}}, Scaling::kBlock), DType::kBf16);
  expect_same_on_all_plans(make_case(rng, 28672, 4096, {{19}, false}, Scaling::kBlock),
                           DType::kBf16);
  expect_same_on_all_plans(make_case(rng, 1536, 2048, few, Scaling::kRow), DType::kBf16);
}

TEST_F(GemmFp8Gpu, E5m2) {
  Rng rng(7);
  for (const Scaling scaling : kScalings)
    for (const DType a : {DType::kE4m3, DType::kE5m2})
      for (const DType b : {DType::kE4m3, DType::kE5m2})
        expect_same_on_all_plans(make_case(rng, 80, 208, {{9, 70}}, scaling, a, b), DType::kFp32);
}

// All codes against all codes, NaNs among them, one product at a time and in sums.
TEST_F(GemmFp8Gpu, AllPairsOfCodes) {
  Rng rng(8);
  for (const int terms : {1, 7}) {
    Case c = make_case(rng, 256, 16, {{256}, false}, Scaling::kRow);
    for (std::int64_t i = 0; i < 256; ++i)
      for (std::int64_t k = 0; k < 16; ++k)
        c.a.view().fp8()[i * 16 + k] = c.b.view().fp8()[i * 16 + k] =
            k < terms ? static_cast<std::uint8_t>(i * (k + 1) + 31 * k) : 0;
    expect_same_on_all_plans(c);
  }
}

// A NaN stays in its row or column, also where tiles read over the end of an expert.
TEST_F(GemmFp8Gpu, NonfiniteOperandsAndScales) {
  Rng rng(9);
  for (const Scaling scaling : kScalings) {
    Case c = make_case(rng, 208, 304, {{70, 61, 3}}, scaling);
    c.a.view().fp8()[1 * 304 + 40] = 0x7F;
    c.a.view().fp8()[70 * 304 + 299] = 0xFF;
    c.b.view().fp8()[7 * 304 + 200] = 0x7F;
    c.b.view().fp8()[208 * 304 + 303] = 0xFF;
    c.sa.as<float>()[3] = std::numeric_limits<float>::quiet_NaN();
    c.sa.as<float>()[4] = std::numeric_limits<float>::infinity();
    c.sb.as<float>()[4] = -std::numeric_limits<float>::quiet_NaN();
    expect_same_on_all_plans(c);
  }
}

TEST_F(GemmFp8Gpu, OverflowAndTinyScales) {
  Rng rng(10);
  for (const Scaling scaling : kScalings)
    for (const float factor : {0x1p+100f, 0x1p-100f, 0x1p-75f}) {
      Case c = make_case(rng, 48, 272, {{70}}, scaling);
      for (std::int64_t i = 0; i < c.sa.view().count(); ++i) c.sa.as<float>()[i] *= factor;
      for (std::int64_t i = 0; i < c.sb.view().count(); ++i)
        c.sb.as<float>()[i] *= i % 2 == 0 ? 1.0f : factor;
      expect_same_on_all_plans(c);
    }
}

// A captured product follows the offsets that its replay finds.
TEST_F(GemmFp8Gpu, ReplaysWithOtherOffsets) {
  Rng rng(11);
  const Case c = make_case(rng, 144, 272, {{40, 0, 120, 13}}, Scaling::kBlock);
  const Shape shape{173, 144};
  const Fp8Rows a{on_gpu(c.a), on_gpu(c.sa), c.scaling};
  const Fp8Weight b{on_gpu(c.b), on_gpu(c.sb), c.scaling};
  const TensorView offsets = on_gpu(c.offsets), found = gpu_output(DType::kBf16, shape);
  const auto stream = static_cast<cudaStream_t>(gpu.stream);
  for (const std::string& plan : cuda::gemm_plan_names()) {
    setenv("LOCKSTEP_PLAN", plan.c_str(), 1);
    fp8_gemm(gpu, a, b, offsets, found);  // takes the workspace's memory
    tensor::synchronize(gpu);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    fp8_gemm(gpu, a, b, offsets, found);
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&replay, graph, 0), cudaSuccess);
    for (const std::vector<std::int32_t>& other :
         std::vector<std::vector<std::int32_t>>{{0, 40, 40, 160, 173},
                                                {0, 0, 0, 0, 173},
                                                {0, 1, 2, 170, 173},
                                                {0, 173, 173, 173, 173}}) {
      const Tensor host = int32_tensor(other), expected = cpu_output(DType::kBf16, shape);
      tensor::copy(gpu, host, offsets);
      tensor::fill_bytes(gpu, found, 0xFF);
      ASSERT_EQ(cudaGraphLaunch(replay, stream), cudaSuccess);
      fp8_gemm(cpu, {c.a, c.sa, c.scaling}, {c.b, c.sb, c.scaling}, host, expected);
      expect_same(expected, found, fmt::format("replay of plan {}", plan));
    }
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
  }
}

TEST_F(GemmFp8Gpu, RefusesOddSizes) {
  Rng rng(12);
  for (const auto& [N, K] : {std::pair{24, 128}, std::pair{32, 40}}) {
    const Case c = make_case(rng, N, K, {{4}, false}, Scaling::kRow);
    EXPECT_THROW(
        fp8_gemm(gpu, {on_gpu(c.a), on_gpu(c.sa), c.scaling},
                 {on_gpu(c.b), on_gpu(c.sb), c.scaling}, {}, gpu_output(DType::kBf16, {4, N})),
        base::ContractError);
  }
}

}  // namespace
}  // namespace lockstep::ops::test
