#include "ops/checksum.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstring>

#include "ops/cuda/checksum.h"
#include "tensor/device.h"

namespace lockstep::ops {
namespace {

std::size_t pieces_of(std::size_t bytes) { return (bytes + kChecksumPiece - 1) / kChecksumPiece; }

void checksum_host(const std::byte* bytes, std::size_t size, std::uint64_t* out) {
  const auto pieces = static_cast<std::int64_t>(pieces_of(size));
#pragma omp parallel for if (pieces > 8)
  for (std::int64_t p = 0; p < pieces; ++p) {
    const std::size_t at = static_cast<std::size_t>(p) * kChecksumPiece;
    out[p] = XXH3_64bits(bytes + at, std::min(kChecksumPiece, size - at));
  }
}

#ifdef LOCKSTEP_HAVE_CUDA
cuda::Xxh3Secret xxh3_secret() {
  cuda::Xxh3Secret s;
  const auto words = [](std::uint64_t* to, std::size_t from, std::size_t count) {
    std::memcpy(to, XXH3_kSecret + from, count * sizeof(*to));
  };
  words(s.stripes, 0, 24);
  words(s.last, XXH_SECRET_DEFAULT_SIZE - 64 - 7, 8);
  words(s.merge, 11, 8);
  return s;
}
#endif

// How many of a tensor's bytes the GPU's kernel takes: short inputs have another hash, and it reads
// 16 bytes at a time.
std::size_t bytes_on_gpu(const TensorView& t) {
  if (t.on_host() || reinterpret_cast<std::uintptr_t>(t.data) % 16 != 0) return 0;
  const std::size_t left = t.bytes() % kChecksumPiece;
  return left > 240 && left % 16 == 0 ? t.bytes() : t.bytes() - left;
}

}  // namespace

std::vector<std::uint64_t> piece_checksums(std::span<const TensorView> tensors) {
  std::size_t count = 0;
  for (const TensorView& t : tensors) count += pieces_of(t.bytes());
  std::vector<std::uint64_t> sums(count);
#ifdef LOCKSTEP_HAVE_CUDA
  std::vector<cuda::ChecksumRange> ranges;
  std::size_t first = 0;
  for (const TensorView& t : tensors) {
    if (const std::size_t bytes = bytes_on_gpu(t); bytes > 0)
      ranges.push_back({t.data, bytes, first});
    first += pieces_of(t.bytes());
  }
  if (!ranges.empty()) cuda::piece_checksums(ranges, xxh3_secret(), sums);
#endif
  std::uint64_t* out = sums.data();
  for (const TensorView& t : tensors) {
    const std::size_t done = bytes_on_gpu(t), rest = t.bytes() - done;
    if (rest > 0) {
      std::uint64_t* to = out + done / kChecksumPiece;
      TensorView bytes = t;
      bytes.data = static_cast<std::byte*>(t.data) + done;
      bytes.dtype = tensor::DType::kE4m3, bytes.shape = {static_cast<std::int64_t>(rest)};
      tensor::read_pieces(bytes, [&](std::span<const std::byte> read) {
        checksum_host(read.data(), read.size(), to);
        to += pieces_of(read.size());
      });
    }
    out += pieces_of(t.bytes());
  }
  return sums;
}

}  // namespace lockstep::ops
