// Checksums of tensors on the GPU against those on the CPU, which are the library's.
#include "ops/checksum.h"

#include "gpu/gpu_test.h"

namespace lockstep::ops::test {
namespace {

class ChecksumGpu : public GpuTest {
 protected:
  Tensor random_bytes(std::int64_t count) {
    Tensor x(Device::kCpu, DType::kE4m3, {count});
    auto* bytes = static_cast<unsigned char*>(x.view().data);
    for (std::int64_t i = 0; i < count; ++i) bytes[i] = static_cast<unsigned char>(rng_());
    return x;
  }
  // The tensor from byte `skip` on.
  static TensorView behind(TensorView x, std::int64_t skip) {
    x.data = static_cast<std::byte*>(x.data) + skip;
    x.shape = {x.count() - skip};
    return x;
  }

 private:
  Rng rng_{1};
};

// Around everything that counts: short inputs, stripes, blocks, pieces; sizes that are no multiple
// of 16, addresses that are none either.
TEST_F(ChecksumGpu, EverySize) {
  std::vector<std::int64_t> sizes;
  for (const std::int64_t near : {0, 16, 64, 240, 256, 1024, 1088, 65536, 66560, 131072, 200000})
    for (const std::int64_t by : {-17, -16, -1, 0, 1, 15, 16, 17, 48, 64})
      if (near + by >= 0) sizes.push_back(near + by);
  sizes.push_back(10 * 65536 + 12345 * 16);
  std::vector<Tensor> tensors;
  std::vector<TensorView> host, device;
  for (const std::int64_t size : sizes)
    for (const std::int64_t skip : {0, 16, 4}) {
      tensors.push_back(random_bytes(size + skip));
      host.push_back(behind(tensors.back(), skip));
      device.push_back(behind(on_gpu(tensors.back()), skip));
      EXPECT_EQ(piece_checksums({&device.back(), 1}), piece_checksums({&host.back(), 1}))
          << size << " bytes from " << skip;
    }
  EXPECT_EQ(piece_checksums(device), piece_checksums(host)) << "all at once";
}

// Every 13th word, which meets all accumulators and stripes.
TEST_F(ChecksumGpu, SeesAChangedBit) {
  const Tensor x = random_bytes(65536 + 3 * 1024 + 64);
  const std::vector<std::uint64_t> before = piece_checksums(std::vector<TensorView>{on_gpu(x)});
  ASSERT_EQ(before.size(), 2u);
  auto* bytes = static_cast<unsigned char*>(x.view().data);
  const std::int64_t count = x.view().count();
  for (std::int64_t at = 5; at < count; at += few_sizes() ? 8 * 331 : 8 * 13) {
    bytes[at] ^= 1;
    const std::vector<std::uint64_t> sums = piece_checksums(std::vector<TensorView>{on_gpu(x)});
    EXPECT_EQ(sums[0] == before[0], at >= 65536) << at;
    EXPECT_EQ(sums[1] == before[1], at < 65536) << at;
    bytes[at] ^= 1;
  }
}

}  // namespace
}  // namespace lockstep::ops::test
