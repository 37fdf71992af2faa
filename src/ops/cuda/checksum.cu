// XXH3-64 of pieces of 64 KiB (github.com/Cyan4973/xxHash, doc/xxhash_spec.md, inputs of more than
// 240 bytes): eight accumulators take a stripe of 64 bytes, one word each; sixteen stripes are a
// block, after which they are scrambled. Four threads work on a piece, two accumulators each.
#include "ops/checksum.h"
#include "ops/cuda/checksum.h"
#include "ops/cuda/launch.cuh"

namespace lockstep::ops::cuda {
namespace {

using Word = std::uint64_t;

constexpr Word kPrime32_1 = 0x9E3779B1u, kPrime32_2 = 0x85EBCA77u, kPrime32_3 = 0xC2B2AE3Du;
constexpr Word kPrime64_1 = 0x9E3779B185EBCA87u, kPrime64_2 = 0xC2B2AE3D27D4EB4Fu,
               kPrime64_3 = 0x165667B19E3779F9u, kPrime64_4 = 0x85EBCA77C2B2AE63u,
               kPrime64_5 = 0x27D4EB2F165667C5u;
constexpr int kStripes = 16;  // of a block

struct Accumulators {
  Word a, b;

  // Each word goes into the other accumulator, and multiplied by itself into its own.
  __device__ void add(ulonglong2 v, Word key_a, Word key_b) {
    const Word x = v.x ^ key_a, y = v.y ^ key_b;
    a += v.y + (x & 0xFFFFFFFFu) * (x >> 32);
    b += v.x + (y & 0xFFFFFFFFu) * (y >> 32);
  }
  __device__ void scramble(Word key_a, Word key_b) {
    a = (a ^ a >> 47 ^ key_a) * kPrime32_1;
    b = (b ^ b >> 47 ^ key_b) * kPrime32_1;
  }
};

constexpr int kThreads = 128, kTeam = 4;

__global__ void __launch_bounds__(kThreads)
    checksum_kernel(const std::byte* data, std::size_t size, Xxh3Secret secret, Word* sums) {
  const int member = static_cast<int>(threadIdx.x) % kTeam;
  const std::size_t piece = (std::size_t{blockIdx.x} * kThreads + threadIdx.x) / kTeam;
  const std::size_t at = piece * kChecksumPiece;
  if (at >= size) return;  // whole teams
  const int bytes = static_cast<int>(min(kChecksumPiece, size - at));
  const auto* from = reinterpret_cast<const ulonglong2*>(data + at) + member;  // a stripe is four
  Word key[kStripes + 2];  // of stripe n: n and n + 1; of the scrambling: the last two
#pragma unroll
  for (int n = 0; n < kStripes + 2; ++n) key[n] = secret.stripes[2 * member + n];
  const Word start[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                         kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  Accumulators acc{};
#pragma unroll
  for (int i = 0; i < kTeam; ++i)
    if (i == member) acc = {start[2 * i], start[2 * i + 1]};

  const int blocks = (bytes - 1) / (64 * kStripes);
  for (int b = 0; b < blocks; ++b, from += 4 * kStripes) {
#pragma unroll
    for (int n = 0; n < kStripes; ++n) acc.add(__ldg(from + 4 * n), key[n], key[n + 1]);
    acc.scramble(key[kStripes], key[kStripes + 1]);
  }
  const int stripes = (bytes - 1 - blocks * 64 * kStripes) / 64;
#pragma unroll
  for (int n = 0; n < kStripes; ++n)
    if (n < stripes) acc.add(__ldg(from + 4 * n), key[n], key[n + 1]);
  const auto* last = reinterpret_cast<const ulonglong2*>(data + at + bytes - 64) + member;
  acc.add(__ldg(last), secret.last[2 * member], secret.last[2 * member + 1]);

  const Word x = acc.a ^ secret.merge[2 * member], y = acc.b ^ secret.merge[2 * member + 1];
  Word sum = x * y ^ __umul64hi(x, y);
  const unsigned team = 0xFu << (threadIdx.x % 32 / kTeam * kTeam);
  sum += __shfl_xor_sync(team, sum, 1);
  sum += __shfl_xor_sync(team, sum, 2);
  sum += static_cast<Word>(bytes) * kPrime64_1;
  sum ^= sum >> 37;
  sum *= 0x165667919E3779F9u;
  sum ^= sum >> 32;
  if (member == 0) sums[piece] = sum;
}

// Kept from call to call; grows where a larger model comes.
Word* device_sums(std::size_t count) {
  static Word* memory = nullptr;
  static std::size_t room = 0;
  if (count > room) {
    if (memory != nullptr) cudaFree(memory);
    memory = nullptr, room = 0;
    tensor::check_cuda(cudaMalloc(&memory, count * sizeof(Word)), "memory for checksums");
    room = count;
  }
  return memory;
}

}  // namespace

void piece_checksums(std::span<const ChecksumRange> ranges, const Xxh3Secret& secret,
                     std::span<std::uint64_t> sums) {
  tensor::check_cuda(cudaDeviceSynchronize(), "work on the GPU");
  Word* out = device_sums(sums.size());
  tensor::check_cuda(cudaMemset(out, 0, sums.size_bytes()), "piece_checksums");
  for (const ChecksumRange& r : ranges) {
    const std::size_t pieces = (r.bytes + kChecksumPiece - 1) / kChecksumPiece;
    const auto blocks = static_cast<unsigned>((pieces * kTeam + kThreads - 1) / kThreads);
    checksum_kernel<<<blocks, kThreads>>>(static_cast<const std::byte*>(r.data), r.bytes, secret,
                                          out + r.first);
    LOCKSTEP_CUDA_LAUNCHED("piece_checksums");
  }
  tensor::check_cuda(cudaMemcpy(sums.data(), out, sums.size_bytes(), cudaMemcpyDeviceToHost),
                     "piece_checksums");
}

}  // namespace lockstep::ops::cuda
