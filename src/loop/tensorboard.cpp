#include "loop/tensorboard.h"

#include <unistd.h>

#include <array>
#include <cstring>

#include "base/error.h"

namespace lockstep::loop {

namespace {

constexpr std::array<std::uint32_t, 256> make_crc_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t x = i;
    for (int bit = 0; bit < 8; ++bit) x = (x >> 1) ^ (x & 1 ? 0x82f63b78u : 0u);
    table[i] = x;
  }
  return table;
}
constexpr std::array<std::uint32_t, 256> kCrcTable = make_crc_table();

template <typename T>
std::string little_endian(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

std::string varint(std::uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  return out + static_cast<char>(value);
}

// Protocol buffer fields by wire type: 0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes.
std::string tag(int field, int wire) {
  return varint(static_cast<std::uint64_t>(field << 3 | wire));
}
std::string integer_field(int field, std::uint64_t x) { return tag(field, 0) + varint(x); }
std::string double_field(int field, double x) { return tag(field, 1) + little_endian(x); }
std::string float_field(int field, float x) { return tag(field, 5) + little_endian(x); }
std::string bytes_field(int field, const std::string& x) {
  return tag(field, 2) + varint(x.size()) + x;
}

std::string event(double wall_time, std::int64_t step, const std::string& what) {
  return tf_record(double_field(1, wall_time) + integer_field(2, static_cast<std::uint64_t>(step)) +
                   what);
}

std::filesystem::path event_file(const std::filesystem::path& folder, double wall_time) {
  char host[256] = "localhost";
  ::gethostname(host, sizeof host - 1);
  // TensorBoard reads the files of a folder in the order of their names.
  return folder / fmt::format("events.out.tfevents.{:010d}.{}.{}",
                              static_cast<std::int64_t>(wall_time), host, base::unique_suffix());
}

}  // namespace

std::uint32_t crc32c(std::string_view data) {
  std::uint32_t crc = ~0u;
  for (const char c : data)
    crc = (crc >> 8) ^ kCrcTable[(crc ^ static_cast<unsigned char>(c)) & 0xff];
  return ~crc;
}

std::string tf_record(std::string_view data) {
  const auto masked = [](std::string_view bytes) {
    const std::uint32_t crc = crc32c(bytes);
    return little_endian(static_cast<std::uint32_t>(((crc >> 15) | (crc << 17)) + 0xa282ead8u));
  };
  const std::string length = little_endian(static_cast<std::uint64_t>(data.size()));
  return length + masked(length) + std::string(data) + masked(data);
}

TensorBoardWriter::TensorBoardWriter(const std::filesystem::path& folder, double wall_time,
                                     std::optional<std::int64_t> resumed_after)
    : file_(event_file(folder, wall_time), base::OutputFile::kCreateNew) {
  file_.write(event(wall_time, 0, bytes_field(3, "brain.Event:2")));
  constexpr int kSessionStart = 1;
  if (resumed_after)
    file_.write(
        event(wall_time, *resumed_after + 1, bytes_field(7, integer_field(1, kSessionStart))));
}

void TensorBoardWriter::append(std::int64_t step, const Metrics& values, double wall_time) {
  std::string summary;
  for (const auto& [name, value] : values) {
    if (std::holds_alternative<std::string>(value)) continue;
    const auto* integer = std::get_if<std::int64_t>(&value);
    const double x = integer != nullptr ? static_cast<double>(*integer) : std::get<double>(value);
    summary += bytes_field(1, bytes_field(1, name) + float_field(2, static_cast<float>(x)));
  }
  file_.write(event(wall_time, step, bytes_field(5, summary)));
}

}  // namespace lockstep::loop
