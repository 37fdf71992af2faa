// The GGUF file format, version 3, read (little endian):
//   "GGUF" | u32 version | u64 tensors | u64 keys | keys: name, u32 type, value | tensors: name,
//   u32 axes, u64 dimensions (contiguous axis first), u32 type, u64 offset | padding to
//   general.alignment (32) | data
// Names and texts are u64 length and bytes. The file is mapped, and every count is checked against
// the bytes that are left before anything is taken, so memory stays in proportion to the file.
// Every refusal is an InputError naming the file and the key or tensor.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model/mapped_file.h"
#include "model/stored_weight.h"

namespace lockstep::model {

enum class GgufKind { kInteger, kFloat, kBool, kText, kIntegers, kFloats, kBools, kTexts };

// One value of the metadata. Texts point into the mapping.
struct GgufValue {
  GgufKind kind = GgufKind::kInteger;
  std::int64_t integer = 0;  // kInteger; kBool: 0 or 1
  double number = 0;         // kFloat
  std::string_view text;
  std::vector<std::int64_t> integers;  // kIntegers, kBools
  std::vector<double> numbers;
  std::vector<std::string_view> texts;
};

struct GgufTensor {
  StoredType type = StoredType::kF32;
  std::vector<std::int64_t> shape;  // outermost axis first, as in safetensors
  const std::byte* data = nullptr;
  std::uint64_t bytes = 0;
};

struct GgufFile {
  MappedFile map;
  std::string file;  // for messages
  std::map<std::string, GgufValue, std::less<>> keys;
  std::map<std::string, GgufTensor, std::less<>> tensors;

  // The value of a key, which must have this kind; null when it is absent.
  const GgufValue* find(std::string_view key, GgufKind kind) const;
  // The same for a key that must be there.
  const GgufValue& at(std::string_view key, GgufKind kind) const;
  std::int64_t integer(std::string_view key) const { return at(key, GgufKind::kInteger).integer; }
  std::int64_t integer(std::string_view key, std::int64_t fallback) const;
};

// Checks the whole header: known types (F32, F16, BF16, Q4_1, Q8_0), rows of whole blocks, sizes
// without overflow, tensors that lie inside of the file at aligned offsets and do not overlap, no
// name twice. No tensor byte is touched.
GgufFile open_gguf(const std::filesystem::path& path);

}  // namespace lockstep::model
