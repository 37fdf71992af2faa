// Writes tests/data/tensor_core/bf16_ends.bin on a Hopper GPU: BF16 steps at the ends of the range,
// 32 blocks in the layout of that folder's README. Block i is of kind i % 5: products that
// underflow, results that overflow, exact cancellation, subnormal operands, signed zeros.
// mma.sync.m16n8k16 gives the same bits as wgmma k16.
//   nvcc -std=c++20 -gencode=arch=compute_90a,code=sm_90a tensor_core_ends.cu -o ends && ./ends
//   bf16_ends.bin
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

constexpr int kBlocks = 32, kRows = 64, kColumns = 8, kTerms = 16;

__device__ std::uint32_t pair(const std::uint16_t* p) {
  return p[0] | (static_cast<std::uint32_t>(p[1]) << 16);
}

// One warp a tile of 16 rows; a [16][16], b [8][16], c and d [16][8].
__global__ void step_kernel(const std::uint16_t* A, const std::uint16_t* B, const float* C,
                            float* D) {
  const int block = blockIdx.x / 4, tile = blockIdx.x % 4, g = threadIdx.x / 4, t = threadIdx.x % 4;
  const std::uint16_t* a = A + (block * kRows + tile * 16) * kTerms;
  const std::uint16_t* b = B + block * kColumns * kTerms;
  const int at = (block * kRows + tile * 16) * kColumns, low = at + g * 8 + 2 * t,
            high = at + (g + 8) * 8 + 2 * t;
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=f"(D[low]), "=f"(D[low + 1]), "=f"(D[high]), "=f"(D[high + 1])
      : "r"(pair(a + g * 16 + 2 * t)), "r"(pair(a + (g + 8) * 16 + 2 * t)),
        "r"(pair(a + g * 16 + 2 * t + 8)), "r"(pair(a + (g + 8) * 16 + 2 * t + 8)),
        "r"(pair(b + g * 16 + 2 * t)), "r"(pair(b + g * 16 + 2 * t + 8)), "f"(C[low]),
        "f"(C[low + 1]), "f"(C[high]), "f"(C[high + 1]));
}

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: %s FILE\n", argv[0]), 2;
  std::mt19937 rng(1);
  const auto value = [&](int low,
                         int high) {  // random sign and mantissa, exponent field in [low, high]
    const unsigned e = static_cast<unsigned>(low) + rng() % static_cast<unsigned>(high - low + 1);
    return static_cast<std::uint16_t>(((rng() & 1) << 15) | (e << 7) | (rng() & 127));
  };
  const auto zero = [&] { return static_cast<std::uint16_t>((rng() & 1) << 15); };
  const auto operand = [&](int kind, bool is_b) -> std::uint16_t {
    switch (kind) {
      case 0:
        return value(1, is_b ? 70 : 60);
      case 1:
        return value(is_b ? 190 : 180, 254);
      case 2:
        return value(126, 128);
      case 3:
        return rng() & 1 ? value(0, 0) : is_b ? value(1, 140) : value(120, 254);
      default:
        return rng() % 40 == 0 ? value(120, 130) : zero();
    }
  };
  std::vector<std::uint16_t> A, B;
  std::vector<float> C;
  for (int block = 0; block < kBlocks; ++block) {
    const int kind = block % 5;
    for (int i = 0; i < kRows * kTerms; ++i)
      A.push_back(kind == 2 && i % kTerms >= 8 ? A[A.size() - 8] ^ 0x8000 : operand(kind, false));
    for (int i = 0; i < kColumns * kTerms; ++i)
      B.push_back(kind == 2 && i % kTerms >= 8 ? B[B.size() - 8] : operand(kind, true));
    for (int i = 0; i < kRows * kColumns; ++i) {
      const unsigned exponent = kind == 1   ? 200 + rng() % 55
                                : kind == 3 ? rng() % 20
                                : kind == 0 ? rng() % 8
                                            : 0;
      const bool only_sign = kind == 2 || kind == 4 || (kind == 0 && rng() % 2);
      const std::uint32_t bits =
          (rng() & 0x80000000u) | (only_sign ? 0 : (exponent << 23) | (rng() & 0x7FFFFF));
      float x;
      std::memcpy(&x, &bits, sizeof(x));
      C.push_back(x);
    }
  }
  std::vector<float> D(C.size());
  std::uint16_t *a, *b;
  float *c, *d;
  cudaMalloc(&a, A.size() * 2), cudaMalloc(&b, B.size() * 2), cudaMalloc(&c, C.size() * 4),
      cudaMalloc(&d, D.size() * 4);
  cudaMemcpy(a, A.data(), A.size() * 2, cudaMemcpyHostToDevice),
      cudaMemcpy(b, B.data(), B.size() * 2, cudaMemcpyHostToDevice);
  cudaMemcpy(c, C.data(), C.size() * 4, cudaMemcpyHostToDevice);
  step_kernel<<<kBlocks * 4, 32>>>(a, b, c, d);
  const cudaError_t error = cudaMemcpy(D.data(), d, D.size() * 4, cudaMemcpyDeviceToHost);
  if (error != cudaSuccess) return std::fprintf(stderr, "%s\n", cudaGetErrorString(error)), 1;
  std::FILE* file = std::fopen(argv[1], "wb");
  bool written = file != nullptr && std::fwrite(A.data(), 2, A.size(), file) == A.size() &&
                 std::fwrite(B.data(), 2, B.size(), file) == B.size() &&
                 std::fwrite(C.data(), 4, C.size(), file) == C.size() &&
                 std::fwrite(D.data(), 4, D.size(), file) == D.size();
  if (file != nullptr) written = std::fclose(file) == 0 && written;
  if (!written) return std::perror(argv[1]), 1;
}
