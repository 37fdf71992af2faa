// Attention where keys, values or queries are not finite: a query's result is that of finite data
// unless it sees such a key (docs/numerics.md, section 8).
#include "gpu/gpu_test.h"
#include "gpu/served_case.h"

namespace lockstep::ops::test {
namespace {

constexpr std::uint16_t kBad[] = {0x7FC0, 0xFFFF, 0x7F80, 0xFF80};  // NaN and infinity

std::uint16_t* bits(const Tensor& t, std::int64_t row) {
  return reinterpret_cast<std::uint16_t*>(t.view().rows(row, 1).data);
}
Tensor copy_of(const Tensor& t) {
  Tensor copy(Device::kCpu, t.view().dtype, t.view().shape);
  std::memcpy(copy.view().data, t.view().data, t.view().bytes());
  return copy;
}

// The training form as a case without pages.
ServedCase packed_case(Rng& rng, const AttentionSizes& n,
                       const std::vector<std::int64_t>& lengths) {
  AttentionCase from = attention_case(rng, n, lengths);
  ServedCase x{n, {}, 0, 0, 0, {}, {}, {}, {}, {}, {}};
  for (const std::int64_t length : lengths) {
    x.parts.push_back({length, length});
    x.max_queries = x.max_keys = std::max(x.max_keys, length);
  }
  x.q_THK = std::move(from.q_THK);
  x.k_RJK = std::move(from.k_TJK);
  x.v_RJK = std::move(from.v_TJK);
  x.offsets_S1 = std::move(from.offsets_S1);
  x.lengths_S = std::move(from.lengths_S);
  return x;
}

std::int64_t key_row(const ServedCase& x, std::size_t s, std::int64_t position) {
  if (!x.pages_SP) return x.offsets_S1.as<std::int32_t>()[s] + position;
  const std::int64_t page =
      x.pages_SP.as<std::int32_t>()[static_cast<std::int64_t>(s) * x.pages_SP.view().dim(1) +
                                    position / x.page_size];
  return page * x.page_size + position % x.page_size;
}

class AttentionNanGpu : public GpuTest {
 protected:
  // Puts NaN and infinities at some keys of every sequence and KV head: into one value, all values
  // or the key. Queries before them must not change; those that see a bad value are NaN in its
  // column and unchanged in the others. (What a bad key does to those that see it is left open.)
  void expect_bad_keys_stay_with_their_queries(Rng& rng, const ServedCase& x) {
    if (left_out(5)) return;
    const AttentionSizes& n = x.sizes;
    const std::int64_t T = x.q_THK.view().dim(0), group = n.H / n.J;
    std::string what = text(n) + " page " + std::to_string(x.page_size) + " parts";
    for (const Part& p : x.parts)
      what += ' ' + std::to_string(p.queries) + '/' + std::to_string(p.keys);
    const auto run_cpu = [&](const Tensor& k, const Tensor& v, Tensor* out, Tensor* lse2) {
      *out = cpu_output(DType::kBf16, {T, n.H, n.Kv});
      *lse2 = cpu_output(DType::kFp32, {T, n.H});
      attention(cpu, x.q_THK, k, n.latent ? TensorView{} : v.view(),
                {x.offsets_S1, x.lengths_S, x.pages_SP, x.page_size}, n.scale, *out, *lse2);
    };
    Tensor out, lse2;
    run_cpu(x.k_RJK, x.v_RJK, &out, &lse2);

    const Tensor k = copy_of(x.k_RJK), v = copy_of(x.v_RJK);
    std::vector<std::pair<std::int64_t, std::int64_t>> open;  // (token, head)
    for (std::size_t s = 0; s < x.parts.size(); ++s) {
      const auto [queries, keys] = x.parts[s];
      if (queries == 0) continue;
      for (std::int64_t j = 0; j < n.J; ++j) {
        const std::int64_t kind = n.latent ? 2 : uniform_int(rng, 0, 2);
        for (std::int64_t count = uniform_int(rng, 1, 3); count > 0; --count) {
          const std::int64_t from = count == 1 ? 0 : std::max<std::int64_t>(0, keys - queries - 2);
          const std::int64_t position = uniform_int(rng, from, keys - 1);
          const std::int64_t row = key_row(x, s, position), column = uniform_int(rng, 0, n.Kv - 1);
          const std::uint16_t bad = kBad[uniform_int(rng, 0, 3)];
          const bool whole = !n.latent || uniform_int(rng, 0, 1) == 0;
          if (kind == 2)
            for (std::int64_t d = 0; d < n.K; ++d)
              if (whole || d == column) bits(k, row)[j * n.K + d] = bad;
          for (std::int64_t d = 0; d < n.Kv; ++d)
            if (kind == 1 || (kind == 0 && d == column)) bits(v, row)[j * n.Kv + d] = bad;
          for (std::int64_t i = 0; i < queries; ++i) {
            if (keys - queries + i < position) continue;
            const std::int64_t t = x.offsets_S1.as<std::int32_t>()[s] + i;
            for (std::int64_t h = j * group; h < (j + 1) * group; ++h) {
              if (kind == 2) open.emplace_back(t, h);
              for (std::int64_t d = 0; d < n.Kv; ++d)
                if (kind == 1 || (kind == 0 && d == column)) bits(out, t)[h * n.Kv + d] = 0x7FFF;
            }
          }
        }
      }
    }
    const auto close = [&](const Tensor& some_out, const Tensor& some_lse2) {
      for (const auto& [t, h] : open) {
        std::memcpy(bits(some_out, t) + h * n.Kv, bits(out, t) + h * n.Kv,
                    static_cast<std::size_t>(n.Kv) * 2);
        some_lse2.as<float>()[t * n.H + h] = lse2.as<float>()[t * n.H + h];
      }
    };
    Tensor cpu_out, cpu_lse2;
    run_cpu(k, v, &cpu_out, &cpu_lse2);
    close(cpu_out, cpu_lse2);
    EXPECT_TRUE(bytes_equal(out, cpu_out)) << "CPU out, " << what;
    EXPECT_TRUE(bytes_equal(lse2, cpu_lse2)) << "CPU lse2, " << what;

    const TensorView gpu_out = gpu_output(DType::kBf16, {T, n.H, n.Kv}),
                     gpu_lse2 = gpu_output(DType::kFp32, {T, n.H});
    attention(gpu, on_gpu(x.q_THK), on_gpu(k), n.latent ? TensorView{} : on_gpu(v),
              {on_gpu(x.offsets_S1), on_gpu(x.lengths_S), on_gpu(x.pages_SP), x.page_size,
               x.max_queries, x.max_keys},
              n.scale, gpu_out, gpu_lse2);
    const Tensor found = from_gpu(gpu_out), found_lse2 = from_gpu(gpu_lse2);
    close(found, found_lse2);
    EXPECT_TRUE(bytes_equal(out, found)) << "GPU out, " << what;
    EXPECT_TRUE(bytes_equal(lse2, found_lse2)) << "GPU lse2, " << what;
  }
};

const AttentionSizes kSizes[] = {
    {4, 2, 32, 32, 0.176},  {8, 2, 64, 64, 0.125},  {8, 1, 128, 128, 0.088}, {2, 1, 96, 80, 0.1},
    {2, 2, 192, 128, 0.07}, {2, 1, 256, 256, 0.06}, {17, 1, 64, 64, 0.125}};

TEST_F(AttentionNanGpu, OfTrainingReachesNoEarlierQuery) {
  Rng rng(1);
  for (const AttentionSizes& n : kSizes)
    for (int repeat = 0; repeat < 3; ++repeat) {
      expect_bad_keys_stay_with_their_queries(rng,
                                              packed_case(rng, n, {1, 2, 15, 16, 17, 63, 64, 65}));
      expect_bad_keys_stay_with_their_queries(rng,
                                              packed_case(rng, n, {127, 128, 129, 0, 300, 500}));
    }
}

TEST_F(AttentionNanGpu, OfPagesReachesNoEarlierQuery) {
  Rng rng(2);
  for (const AttentionSizes& n : kSizes)
    for (const std::int64_t page_size : {7, 16, 128})
      for (const std::vector<Part>& parts : {std::vector<Part>{{1, 1}, {1, 129}, {0, 5}, {1, 300}},
                                             {{2, 129}, {4, 130}, {16, 16}, {5, 257}, {3, 200}},
                                             {{70, 70}, {64, 200}, {129, 131}, {1, 77}, {2, 128}}})
        expect_bad_keys_stay_with_their_queries(rng, served_case(rng, n, parts, page_size));
}

TEST_F(AttentionNanGpu, ReachesNoEarlierQueryAcrossSplits) {
  Rng rng(3);
  for (const AttentionSizes& n :
       {AttentionSizes{4, 1, 64, 64, 0.125}, AttentionSizes{2, 2, 128, 128, 0.088},
        AttentionSizes{4, 2, 32, 32, 0.176}}) {
    expect_bad_keys_stay_with_their_queries(
        rng, served_case(rng, n, {{4, 2050}, {2, 2049}, {100, 2100}, {1, 4097}, {3, 2048}}, 16));
    expect_bad_keys_stay_with_their_queries(rng, packed_case(rng, n, {2100}));
  }
}

// Tiles of latent attention hold several tokens where a KV head has few heads.
TEST_F(AttentionNanGpu, OfLatentKeysReachesNoEarlierQuery) {
  Rng rng(5);
  for (const AttentionSizes& n :
       {AttentionSizes{16, 1, 576, 512, 0.04, true}, AttentionSizes{1, 1, 32, 32, 0.17, true},
        AttentionSizes{5, 1, 96, 80, 0.1, true}, AttentionSizes{6, 3, 64, 64, 0.125, true},
        AttentionSizes{70, 1, 48, 32, 0.14, true}}) {
    expect_bad_keys_stay_with_their_queries(rng, packed_case(rng, n, {1, 16, 65, 130, 0, 200}));
    for (const std::int64_t page_size : {7, 16})
      expect_bad_keys_stay_with_their_queries(
          rng,
          served_case(rng, n, {{2, 129}, {4, 130}, {70, 257}, {1, 77}, {129, 131}}, page_size));
    if (n.K < 100)
      expect_bad_keys_stay_with_their_queries(
          rng, served_case(rng, n, {{4, 2050}, {30, 2060}, {1, 40}}, 16));
  }
}

// The gradients of a sequence do not change with what stands beside it.
TEST_F(AttentionNanGpu, OfASequenceLeavesTheGradientsOfTheOthersAlone) {
  Rng rng(4);
  for (const AttentionSizes& n : kSizes) {
    const AttentionCase x = attention_case(rng, n, {70, 131, 33, 200, 5});
    const Shape out_shape = {x.T(), n.H, n.Kv};
    const Tensor out = cpu_output(DType::kBf16, out_shape),
                 lse2 = cpu_output(DType::kFp32, {x.T(), n.H}),
                 d_out = random_normal(rng, DType::kBf16, out_shape);
    attention(cpu, x.q_THK, x.k_TJK, x.v_TJK, x.batch(), n.scale, out, lse2);
    std::vector<Tensor> expected;
    for (const Tensor* t : {&x.q_THK, &x.k_TJK, &x.v_TJK})
      expected.push_back(cpu_output(DType::kBf16, t->view().shape));
    attention_backward(cpu, x.q_THK, x.k_TJK, x.v_TJK, out, lse2, d_out, x.batch(), n.scale,
                       expected[0], expected[1], expected[2]);
    const auto break_rows = [&](const TensorView& t) {
      for (const std::size_t s : {std::size_t{1}, std::size_t{3}}) {
        const TensorView rows = t.rows(x.begin(s), x.lengths[s]);
        std::memset(rows.data, 0xFF, rows.bytes());
      }
    };
    std::vector<TensorView> inputs;
    for (const Tensor* t : {&x.q_THK, &x.k_TJK, &x.v_TJK, &out, &lse2, &d_out}) {
      break_rows(*t);
      inputs.push_back(on_gpu(*t));
    }
    std::vector<TensorView> found;
    for (const Tensor& t : expected) found.push_back(gpu_output(DType::kBf16, t.view().shape));
    attention_backward(gpu, inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5],
                       {on_gpu(x.offsets_S1), on_gpu(x.lengths_S), {}, 0}, n.scale, found[0],
                       found[1], found[2]);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const Tensor gradient = from_gpu(found[i]);
      break_rows(expected[i]);
      break_rows(gradient);
      EXPECT_TRUE(bytes_equal(expected[i], gradient)) << text(n) << " gradient " << i;
    }
  }
}

}  // namespace
}  // namespace lockstep::ops::test
