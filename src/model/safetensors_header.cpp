#include "model/safetensors_header.h"

#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "base/error.h"

namespace lockstep::model {

using base::fail;
using base::InputError;

namespace {

struct DtypeRow {
  FileDtype dtype;
  const char* name;
  std::size_t bytes;
};
constexpr DtypeRow kDtypes[] = {
    {FileDtype::kBool, "BOOL", 1},      {FileDtype::kU8, "U8", 1},
    {FileDtype::kI8, "I8", 1},          {FileDtype::kF8E4M3, "F8_E4M3", 1},
    {FileDtype::kF8E5M2, "F8_E5M2", 1}, {FileDtype::kF8E8M0, "F8_E8M0", 1},
    {FileDtype::kU16, "U16", 2},        {FileDtype::kI16, "I16", 2},
    {FileDtype::kF16, "F16", 2},        {FileDtype::kBF16, "BF16", 2},
    {FileDtype::kU32, "U32", 4},        {FileDtype::kI32, "I32", 4},
    {FileDtype::kF32, "F32", 4},        {FileDtype::kU64, "U64", 8},
    {FileDtype::kI64, "I64", 8},        {FileDtype::kF64, "F64", 8},
};

const DtypeRow& row_of(FileDtype dtype) { return kDtypes[static_cast<int>(dtype)]; }

// Receives the parser's events in order and accepts exactly the grammar
//   { name: {"dtype": str, "shape": [n...], "data_offsets": [n, n]}, "__metadata__": {str: str} }
// so nesting deeper than that never gets built. The library's DOM would keep the last of two equal
// keys; here the second one is seen.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(std::string file) : file_(std::move(file)) {}
  SafetensorsHeader take() { return std::move(header_); }

  bool start_object(std::size_t) override {
    if (place_ == kStart) {
      place_ = kTop;
    } else if (place_ == kTopValue) {
      place_ = name_ == "__metadata__" ? kMetadata : kTensor;
      if (place_ == kTensor) header_.tensors.push_back({name_, {}, {}, 0, 0});
      seen_fields_.clear();
    } else {
      wrong("an object");
    }
    return true;
  }

  bool key(std::string& key) override {
    if (place_ == kTop) {
      if (!names_.insert(key).second)
        fail<InputError>("{}: duplicate tensor name '{}'", file_, key);
      name_ = key;
      place_ = kTopValue;
    } else if (place_ == kMetadata) {
      if (!seen_fields_.insert(key).second)
        fail<InputError>("{}: __metadata__ has the key '{}' twice", file_, key);
      field_ = key;
      place_ = kMetadataValue;
    } else {
      if (key != "dtype" && key != "shape" && key != "data_offsets")
        fail<InputError>("{}: tensor '{}': unknown field '{}'", file_, name_, key);
      if (!seen_fields_.insert(key).second)
        fail<InputError>("{}: tensor '{}': field '{}' twice", file_, name_, key);
      field_ = key;
      place_ = kField;
    }
    return true;
  }

  bool string(std::string& value) override {
    if (place_ == kMetadataValue) {
      header_.metadata[field_] = value;
      place_ = kMetadata;
    } else if (place_ == kField && field_ == "dtype") {
      if (!dtype_from_name(value, &header_.tensors.back().dtype))
        fail<InputError>("{}: tensor '{}': dtype '{}' is not supported", file_, name_, value);
      place_ = kTensor;
    } else {
      wrong("a string");
    }
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != kField || field_ == "dtype") wrong("an array");
    place_ = kArray;
    numbers_.clear();
    return true;
  }

  bool number_unsigned(std::uint64_t value) override {
    if (place_ != kArray) wrong("a number");
    numbers_.push_back(value);
    return true;
  }

  bool end_array() override {
    HeaderTensor& tensor = header_.tensors.back();
    if (field_ == "shape") {
      for (const std::uint64_t n : numbers_) {
        if (n > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
          fail<InputError>("{}: tensor '{}': dimension {} is too large", file_, name_, n);
        tensor.shape.push_back(static_cast<std::int64_t>(n));
      }
    } else {
      if (numbers_.size() != 2)
        fail<InputError>("{}: tensor '{}': data_offsets has {} numbers, expected 2", file_, name_,
                         numbers_.size());
      tensor.begin = numbers_[0];
      tensor.end = numbers_[1];
    }
    place_ = kTensor;
    return true;
  }

  bool end_object() override {
    if (place_ == kTensor) {
      for (const char* field : {"dtype", "shape", "data_offsets"})
        if (!seen_fields_.count(field))
          fail<InputError>("{}: tensor '{}': field '{}' is missing", file_, name_, field);
    }
    place_ = place_ == kTop ? kEnd : kTop;
    return true;
  }

  bool null() override { return wrong("null"); }
  bool boolean(bool) override { return wrong("true or false"); }
  bool number_integer(std::int64_t value) override { return wrong(fmt::format("{}", value)); }
  bool number_float(double, const std::string& text) override { return wrong(text); }
  bool binary(nlohmann::json::binary_t&) override { return wrong("binary data"); }
  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception& e) override {
    fail<InputError>("{}: the header is not valid JSON ({})", file_, e.what());
  }

 private:
  enum Place { kStart, kTop, kTopValue, kTensor, kField, kArray, kMetadata, kMetadataValue, kEnd };

  bool wrong(const std::string& what) const {
    switch (place_) {
      case kField:
      case kArray:
        fail<InputError>("{}: tensor '{}': field '{}' may not hold {} (expected {})", file_, name_,
                         field_, what,
                         field_ == "dtype" ? "a string" : "a list of whole numbers, none negative");
      case kMetadataValue:
        fail<InputError>("{}: __metadata__ '{}' may not hold {} (expected a string)", file_, field_,
                         what);
      case kTopValue:
        fail<InputError>("{}: tensor '{}' may not hold {} (expected an object)", file_, name_,
                         what);
      default:
        fail<InputError>("{}: the header may not hold {} here (expected an object)", file_, what);
    }
  }

  std::string file_;
  SafetensorsHeader header_;
  Place place_ = kStart;
  std::string name_, field_;
  std::set<std::string> names_, seen_fields_;
  std::vector<std::uint64_t> numbers_;
};

}  // namespace

const char* dtype_name(FileDtype dtype) { return row_of(dtype).name; }
std::size_t dtype_item_bytes(FileDtype dtype) { return row_of(dtype).bytes; }

bool dtype_from_name(std::string_view name, FileDtype* dtype) {
  for (const DtypeRow& row : kDtypes)
    if (name == row.name) {
      *dtype = row.dtype;
      return true;
    }
  return false;
}

bool checked_bytes(const std::vector<std::int64_t>& shape, FileDtype dtype, std::uint64_t* bytes) {
  *bytes = dtype_item_bytes(dtype);
  for (const std::int64_t n : shape)
    if (n < 0 || __builtin_mul_overflow(*bytes, static_cast<std::uint64_t>(n), bytes)) return false;
  return true;
}

SafetensorsHeader parse_safetensors_header(std::string_view text, const std::string& file) {
  if (text.empty() || text.front() != '{')
    fail<InputError>("{}: not a safetensors file: the header does not start with '{{'", file);
  HeaderReader reader(file);
  nlohmann::json::sax_parse(text, &reader);
  return reader.take();
}

}  // namespace lockstep::model
