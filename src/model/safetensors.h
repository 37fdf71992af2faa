// The safetensors file format, read and written. Layout (little endian):
//   u64 header_bytes | header: JSON object, space padded | tensor data
// where the header maps a name to {"dtype", "shape", "data_offsets": [begin, end]} with offsets
// from the start of the data, and "__metadata__" to strings. Rules as in the reference reader
// (huggingface/safetensors, safetensors/src/tensor.rs): at most 100,000,000 header bytes, starts
// with '{', the tensors fill the data without hole or overlap and end at the end of the file, end -
// begin equals the product of the shape times the element size with every multiplication checked.
// Stricter here: duplicate names, unknown fields and element types below one byte are refused.
// Every refusal is an InputError that names the file and, where there is one, the tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace lockstep::model {

enum class FileDtype {
  kBool,
  kU8,
  kI8,
  kF8E4M3,
  kF8E5M2,
  kF8E8M0,
  kU16,
  kI16,
  kF16,
  kBF16,
  kU32,
  kI32,
  kF32,
  kU64,
  kI64,
  kF64
};

const char* dtype_name(FileDtype dtype);        // as in the file: "BF16", "F8_E4M3", ...
std::size_t dtype_item_bytes(FileDtype dtype);  // 1, 2, 4 or 8

// One tensor of an opened file. `bytes` points into the mapping and lives as long as the
// SafetensorsFile (or a copy of it). NOTE: the format does not promise alignment: copy with memcpy
// unless the address is checked.
struct FileTensor {
  FileDtype dtype;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;
};

struct SafetensorsFile {
  std::filesystem::path path;
  std::map<std::string, FileTensor> tensors;
  std::map<std::string, std::string> metadata;
  std::shared_ptr<const void> mapping;  // keeps the bytes alive

  // The tensor of that name; InputError names the file and the tensor when it is absent.
  const FileTensor& at(const std::string& name) const;
};

// Maps the file read-only and checks all of its header before it returns; no tensor byte is
// touched. The size is taken at open. A file that another process truncates while it is mapped
// raises SIGBUS on access, as for every mmap: replace files by rename (what the writer below does),
// never in place.
SafetensorsFile open_safetensors(const std::filesystem::path& path);

// A tensor to write. When `data` is null, `fill` is called once with the destination, so that a
// large model is converted one tensor at a time.
struct TensorToWrite {
  std::string name;
  FileDtype dtype;
  std::vector<std::int64_t> shape;
  const void* data = nullptr;
  std::function<void(std::span<std::byte>)> fill = nullptr;
};

// Writes the file durably: temporary file beside it, fsync, rename, so it may replace a file that
// is mapped at this moment. The bytes depend on the tensors alone, not on their order in the list:
// wider element types first (which keeps every tensor aligned to its element), then by name.
// `metadata` gets {"format": "pt"} added, which the transformers library asks for.
void write_safetensors(const std::filesystem::path& path, std::vector<TensorToWrite> tensors,
                       std::map<std::string, std::string> metadata = {});

}  // namespace lockstep::model
