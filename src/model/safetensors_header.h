// The JSON header of a safetensors file as plain data. Internal to model/safetensors*.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "model/safetensors.h"

namespace lockstep::model {

struct HeaderTensor {
  std::string name;
  FileDtype dtype;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;
};

struct SafetensorsHeader {
  std::vector<HeaderTensor> tensors;
  std::map<std::string, std::string> metadata;
};

// Parses and checks form (types, names, known fields, no duplicates); offsets are checked against
// the file by the caller. InputError starts with `file`.
SafetensorsHeader parse_safetensors_header(std::string_view text, const std::string& file);

// Element count times element size, checked; false on overflow of 64 bits.
bool checked_bytes(const std::vector<std::int64_t>& shape, FileDtype dtype, std::uint64_t* bytes);

// False for a name outside FileDtype.
bool dtype_from_name(std::string_view name, FileDtype* dtype);

}  // namespace lockstep::model
