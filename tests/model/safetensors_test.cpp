// The reader against files built by hand, byte by byte, so that it is not tested only against the
// writer.
#include "model/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "base/error.h"

namespace lockstep::model {
namespace {

namespace fs = std::filesystem;

struct SafetensorsTest : testing::Test {
  fs::path dir = fs::path(testing::TempDir()) /
                 ("safetensors_" + std::to_string(::getpid()) + "_" +
                  testing::UnitTest::GetInstance()->current_test_info()->name());
  fs::path file = dir / "m.safetensors";
  void SetUp() override { fs::create_directories(dir); }
  void TearDown() override { fs::remove_all(dir); }

  void put(const std::string& bytes) { std::ofstream(file, std::ios::binary) << bytes; }
  static std::string length(std::uint64_t n) {
    return std::string(reinterpret_cast<const char*>(&n), 8);
  }
  void put(const std::string& header, std::size_t data_bytes) {
    put(length(header.size()) + header + std::string(data_bytes, '\x2a'));
  }
  // The message of the refusal; fails the test when the file is accepted.
  std::string refusal() {
    try {
      open_safetensors(file);
    } catch (const base::InputError& e) {
      EXPECT_NE(std::string(e.what()).find(file.string()), std::string::npos) << e.what();
      return e.what();
    }
    ADD_FAILURE() << "accepted";
    return "";
  }
  void expect_refused(const std::string& header, std::size_t data_bytes, const std::string& part) {
    put(header, data_bytes);
    const std::string message = refusal();
    EXPECT_NE(message.find(part), std::string::npos) << header << " gave: " << message;
  }
};

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape +
         "],\"data_offsets\":[" + offsets + "]}";
}

const std::string kGood = "{" + tensor("a", "F32", "2", "0,8") + "," +
                          tensor("b", "BF16", "1,3", "8,14") + ",\"__metadata__\":{\"k\":\"v\"}}  ";

TEST_F(SafetensorsTest, reads_a_hand_made_file) {
  put(kGood, 14);
  const SafetensorsFile f = open_safetensors(file);
  ASSERT_EQ(f.tensors.size(), 2u);
  EXPECT_EQ(f.at("a").dtype, FileDtype::kF32);
  EXPECT_EQ(f.at("b").shape, (std::vector<std::int64_t>{1, 3}));
  EXPECT_EQ(f.at("b").bytes.size(), 6u);
  EXPECT_EQ(f.at("b").bytes[5], std::byte{0x2a});
  EXPECT_EQ(f.at("b").bytes.data(), f.at("a").bytes.data() + 8);
  EXPECT_EQ(f.metadata.at("k"), "v");
  try {
    f.at("nope");
    FAIL();
  } catch (const base::InputError& e) {
    EXPECT_NE(std::string(e.what()).find("'nope' is missing"), std::string::npos);
  }
}

TEST_F(SafetensorsTest, accepts_scalars_and_empty_tensors) {
  put("{" + tensor("s", "F32", "", "0,4") + "," + tensor("e", "F32", "0,5", "4,4") + "}", 4);
  const SafetensorsFile f = open_safetensors(file);
  EXPECT_TRUE(f.at("s").shape.empty());
  EXPECT_EQ(f.at("e").bytes.size(), 0u);
  put("{}", 0);
  EXPECT_TRUE(open_safetensors(file).tensors.empty());
}

TEST_F(SafetensorsTest, refuses_a_cut_at_every_byte) {
  const std::string whole = length(kGood.size()) + kGood + std::string(14, 'x');
  put(whole);
  open_safetensors(file);
  for (std::size_t n = 0; n < whole.size(); ++n) {
    SCOPED_TRACE(n);
    put(whole.substr(0, n));
    refusal();
    // A header length that fits the cut header: the JSON itself must be found incomplete.
    if (n > 8 && n < 8 + kGood.size() - 2) {
      put(length(n - 8) + kGood.substr(0, n - 8));
      refusal();
    }
  }
}

TEST_F(SafetensorsTest, refuses_bad_header_lengths) {
  for (const std::uint64_t n :
       {std::uint64_t{0}, std::uint64_t{100'000'001}, std::uint64_t{1} << 63, ~std::uint64_t{0},
        std::uint64_t{kGood.size() + 15}}) {
    SCOPED_TRACE(n);
    put(length(n) + kGood + std::string(14, 'x'));
    refusal();
  }
  fs::remove(file);
  refusal();
  fs::create_directory(file);
  refusal();
}

TEST_F(SafetensorsTest, refuses_malformed_headers_and_names_the_tensor) {
  const auto one = [](const std::string& d, const std::string& s, const std::string& o) {
    return "{" + tensor("w.x", d, s, o) + "}";
  };
  expect_refused("{\"\xff\xfe\":{}}", 0, "JSON");
  expect_refused("[1]", 0, "start with");
  expect_refused(" " + one("F32", "1", "0,4"), 4, "start with");
  expect_refused("{\"w.x\":3}", 0, "'w.x'");
  expect_refused("{\"w.x\":[]}", 0, "'w.x'");
  expect_refused("{\"w.x\":{\"dtype\":{\"deep\":1}}}", 0, "'w.x'");
  expect_refused("{\"w.x\":" + std::string(100000, '['), 0, "'w.x'");
  expect_refused("{\"w.x\":{\"shape\":[[1]]}}", 0, "'w.x'");
  expect_refused("{\"w.x\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "data_offsets' is missing");
  expect_refused("{\"w.x\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 4, "'dtype' twice");
  expect_refused("{\"w.x\":{\"extra\":1}}", 4, "unknown field 'extra'");
  expect_refused(
      "{" + tensor("w.x", "U8", "1", "0,1") + "," + tensor("w.x", "U8", "1", "1,2") + "}", 2,
      "duplicate tensor name 'w.x'");
  expect_refused("{" + tensor("h", "U8", "1", "0,1") + "," + tensor("w.x", "U8", "1", "2,3") + "}",
                 3, "'w.x': data_offsets [2, 3] should begin at 1 (there is a hole");
  expect_refused("{" + tensor("h", "U8", "2", "0,2") + "," + tensor("w.x", "U8", "2", "1,3") + "}",
                 3, "'w.x': data_offsets [1, 3] should begin at 2 (it overlaps");
  expect_refused(one("U8", "1", "1,2"), 2, "hole");
  expect_refused(one("U8", "0", "4,0"), 0, "backwards");
  expect_refused(one("F32", "4294967296,4294967296", "0,0"), 0, "'w.x': the size of shape");
  expect_refused(one("F64", "2305843009213693952", "0,0"), 0, "overflows");
  expect_refused(one("U8", "9223372036854775808", "0,0"), 0, "too large");
  expect_refused(one("U8", "18446744073709551616", "0,0"), 0, "'w.x'");
  expect_refused(one("F32", "2", "0,4"), 4, "needs 8 bytes");
  expect_refused(one("U8", "8", "0,8"), 4, "truncated");
  expect_refused(one("U8", "-1", "0,1"), 1, "'w.x': field 'shape' may not hold -1");
  expect_refused(one("U8", "1.0", "0,1"), 1, "'w.x': field 'shape' may not hold 1.0");
  expect_refused(one("U8", "true", "0,1"), 1, "'w.x'");
  expect_refused(one("U8", "1", "0,1,2"), 1, "3 numbers");
  expect_refused(one("U8", "1", "0"), 1, "1 numbers");
  expect_refused(one("U8", "1", "-1,0"), 1, "'data_offsets' may not hold -1");
  expect_refused(one("U8", "1", "0,1"), 2, "1 bytes after the last tensor 'w.x'");
  expect_refused(one("F4", "2", "0,1"), 1, "'w.x': dtype 'F4' is not supported");
  expect_refused(one("float", "2", "0,1"), 1, "dtype 'float'");
  expect_refused("{\"__metadata__\":{\"n\":1}}", 0, "__metadata__ 'n'");
  expect_refused("{\"__metadata__\":\"x\"}", 0, "__metadata__");
  expect_refused("{\"__metadata__\":{\"a\":\"\",\"a\":\"\"}}", 0, "twice");
  expect_refused("{}{}", 0, "JSON");
  expect_refused("{} x", 0, "JSON");
}

TEST_F(SafetensorsTest, round_trip_is_deterministic_and_aligned) {
  const std::vector<float> w = {1.5f, -2.f, 3.25f};
  const std::vector<std::uint8_t> q = {1, 2, 3};
  const std::vector<std::uint16_t> h = {7, 8};
  std::vector<TensorToWrite> list = {{"q", FileDtype::kF8E4M3, {3}, q.data()},
                                     {"z.w", FileDtype::kF32, {3, 1}, w.data()},
                                     {"empty", FileDtype::kI64, {0}},
                                     {"h", FileDtype::kBF16, {2}}};
  list[3].fill = [&](std::span<std::byte> out) { std::memcpy(out.data(), h.data(), 4); };
  write_safetensors(file, list, {{"note", "\xc3\xa9"}});
  const SafetensorsFile f = open_safetensors(file);
  EXPECT_EQ(f.tensors.size(), 4u);
  EXPECT_EQ(f.metadata.at("format"), "pt");
  EXPECT_EQ(f.metadata.at("note"), "\xc3\xa9");
  EXPECT_EQ(std::memcmp(f.at("z.w").bytes.data(), w.data(), 12), 0);
  EXPECT_EQ(std::memcmp(f.at("q").bytes.data(), q.data(), 3), 0);
  EXPECT_EQ(std::memcmp(f.at("h").bytes.data(), h.data(), 4), 0);
  for (const auto& [name, t] : f.tensors)
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(t.bytes.data()) % dtype_item_bytes(t.dtype), 0u);

  std::swap(list[0], list[1]);
  write_safetensors(dir / "again", list, {{"note", "\xc3\xa9"}});
  const auto slurp = [](const fs::path& p) {
    std::ifstream in(p, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  };
  EXPECT_EQ(slurp(file), slurp(dir / "again"));
  std::size_t files = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(dir)) ++files;
  EXPECT_EQ(files, 2u) << "a temporary file was left";
}

TEST_F(SafetensorsTest, may_replace_the_file_it_reads_from) {
  std::vector<float> w(5000, 2.f);
  write_safetensors(file, {{"w", FileDtype::kF32, {5000}, w.data()}});
  const SafetensorsFile mapped = open_safetensors(file);
  write_safetensors(file, {{"w", FileDtype::kF32, {5000}, mapped.at("w").bytes.data()}});
  const SafetensorsFile again = open_safetensors(file);
  EXPECT_EQ(std::memcmp(again.at("w").bytes.data(), w.data(), 20000), 0);
  EXPECT_EQ(std::memcmp(mapped.at("w").bytes.data(), w.data(), 20000), 0);
}

TEST_F(SafetensorsTest, a_failed_write_leaves_the_old_file) {
  const float one = 1.f;
  write_safetensors(file, {{"w", FileDtype::kF32, {1}, &one}});
  std::vector<TensorToWrite> bad = {{"w", FileDtype::kF32, {1}}};
  bad[0].fill = [](std::span<std::byte>) { throw std::runtime_error("source gone"); };
  EXPECT_THROW(write_safetensors(file, bad), std::runtime_error);
  EXPECT_EQ(open_safetensors(file).at("w").bytes.size(), 4u);
  EXPECT_THROW(write_safetensors(dir / "no" / "folder", {}), base::SystemError);
  EXPECT_EQ(std::distance(fs::directory_iterator(dir), fs::directory_iterator{}), 1);
  EXPECT_THROW(write_safetensors(
                   file, {{"w", FileDtype::kF32, {1}, &one}, {"w", FileDtype::kF32, {1}, &one}}),
               base::ContractError);
}

}  // namespace
}  // namespace lockstep::model
