#include "model/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "base/file_io.h"
#include "model/mapped_file.h"
#include "model/safetensors_header.h"

namespace lockstep::model {

static_assert(std::endian::native == std::endian::little, "the format is little endian");

using base::fail;
using base::InputError;

static constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

namespace {

// The data must be filled from 0 to `data_bytes` by the tensors in order of their offsets.
void check_layout(const std::vector<HeaderTensor>& tensors, std::uint64_t data_bytes,
                  const std::string& file) {
  std::vector<const HeaderTensor*> by_offset;
  for (const HeaderTensor& t : tensors) by_offset.push_back(&t);
  std::sort(by_offset.begin(), by_offset.end(), [](const HeaderTensor* a, const HeaderTensor* b) {
    return std::tie(a->begin, a->end) < std::tie(b->begin, b->end);
  });
  std::uint64_t at = 0;
  for (const HeaderTensor* t : by_offset) {
    if (t->begin != at || t->end < t->begin)
      fail<InputError>("{}: tensor '{}': data_offsets [{}, {}] should begin at {} ({})", file,
                       t->name, t->begin, t->end, at,
                       t->end < t->begin ? "they run backwards"
                       : t->begin < at   ? "it overlaps the tensor before it"
                                         : "there is a hole before it");
    std::uint64_t bytes = 0;
    if (!checked_bytes(t->shape, t->dtype, &bytes))
      fail<InputError>("{}: tensor '{}': the size of shape [{}] overflows 64 bits", file, t->name,
                       fmt::join(t->shape, ", "));
    if (bytes != t->end - t->begin)
      fail<InputError>("{}: tensor '{}': shape [{}] of {} needs {} bytes, data_offsets give {}",
                       file, t->name, fmt::join(t->shape, ", "), dtype_name(t->dtype), bytes,
                       t->end - t->begin);
    if (t->end > data_bytes)
      fail<InputError>("{}: tensor '{}' ends at byte {} of the data, the file has {} (truncated?)",
                       file, t->name, t->end, data_bytes);
    at = t->end;
  }
  if (at != data_bytes)
    fail<InputError>("{}: {} bytes after the last tensor '{}'", file, data_bytes - at,
                     by_offset.empty() ? "" : by_offset.back()->name);
}

std::string header_text(const std::vector<TensorToWrite>& tensors,
                        const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header;
  header["__metadata__"] = metadata;
  std::uint64_t at = 0;
  for (const TensorToWrite& t : tensors) {
    std::uint64_t bytes = 0;
    LOCKSTEP_CHECK(checked_bytes(t.shape, t.dtype, &bytes), "tensor '{}': size overflows", t.name);
    LOCKSTEP_CHECK(t.name != "__metadata__" && !header.contains(t.name),
                   "tensor name '{}' is reserved or used twice", t.name);
    header[t.name] = {
        {"dtype", dtype_name(t.dtype)}, {"shape", t.shape}, {"data_offsets", {at, at + bytes}}};
    at += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  LOCKSTEP_CHECK(text.size() <= kMaxHeaderBytes, "header of {} bytes", text.size());
  return text;
}

}  // namespace

const FileTensor& SafetensorsFile::at(const std::string& name) const {
  const auto found = tensors.find(name);
  if (found == tensors.end()) fail<InputError>("{}: tensor '{}' is missing", path.string(), name);
  return found->second;
}

SafetensorsFile open_safetensors(const std::filesystem::path& path) {
  const MappedFile map = map_file(path);
  const std::string file = path.string();
  const std::size_t size = map.bytes.size();
  if (size < 8) fail<InputError>("{}: {} bytes are too few for a safetensors file", file, size);
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, map.bytes.data(), 8);
  if (header_bytes > kMaxHeaderBytes)
    fail<InputError>("{}: header length {} is over the limit of {}", file, header_bytes,
                     kMaxHeaderBytes);
  if (header_bytes > size - 8)
    fail<InputError>("{}: header length {} but only {} bytes follow (truncated?)", file,
                     header_bytes, size - 8);
  const SafetensorsHeader header = parse_safetensors_header(
      {reinterpret_cast<const char*>(map.bytes.data()) + 8, static_cast<std::size_t>(header_bytes)},
      file);
  const std::byte* data = map.bytes.data() + 8 + header_bytes;
  check_layout(header.tensors, size - 8 - header_bytes, file);

  SafetensorsFile out{path, {}, header.metadata, map.owner};
  for (const HeaderTensor& t : header.tensors)
    out.tensors.emplace(t.name, FileTensor{t.dtype, t.shape, {data + t.begin, t.end - t.begin}});
  return out;
}

void write_safetensors(const std::filesystem::path& path, std::vector<TensorToWrite> tensors,
                       std::map<std::string, std::string> metadata) {
  metadata.emplace("format", "pt");
  std::sort(tensors.begin(), tensors.end(), [](const TensorToWrite& a, const TensorToWrite& b) {
    const std::size_t wide_a = dtype_item_bytes(a.dtype), wide_b = dtype_item_bytes(b.dtype);
    return wide_a != wide_b ? wide_a > wide_b : a.name < b.name;
  });
  const std::string header = header_text(tensors, metadata);
  const std::uint64_t header_bytes = header.size();

  base::AtomicFile out(path);
  out.file().write(&header_bytes, 8);
  out.file().write(header);
  std::vector<std::byte> buffer;
  for (const TensorToWrite& t : tensors) {
    std::uint64_t bytes = 0;
    checked_bytes(t.shape, t.dtype, &bytes);
    if (bytes == 0) continue;
    if (t.data == nullptr) {
      LOCKSTEP_CHECK(t.fill != nullptr, "tensor '{}' has neither data nor fill", t.name);
      buffer.resize(bytes);
      t.fill(buffer);
    }
    out.file().write(t.data != nullptr ? t.data : buffer.data(), bytes);
  }
  out.commit();
}

}  // namespace lockstep::model
