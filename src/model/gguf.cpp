#include "model/gguf.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "base/error.h"

namespace lockstep::model {

using base::fail;
using base::InputError;

static constexpr std::uint32_t kVersion = 3;
static constexpr std::size_t kMaxName = 1024;
static constexpr int kMaxAxes = 4;
static constexpr std::uint64_t kDefaultAlignment = 32, kMaxAlignment = 1 << 20;

namespace {

enum TypeId : std::uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};  // in the format's order

struct TensorTypeRow {
  std::uint32_t id;
  StoredType type;
  std::int64_t block;  // values
};
constexpr TensorTypeRow kTensorTypes[] = {
    {0, StoredType::kF32, 1},           {1, StoredType::kF16, 1},
    {3, StoredType::kQ4_1, kGgufBlock}, {8, StoredType::kQ8_0, kGgufBlock},
    {30, StoredType::kBf16, 1},
};

std::size_t scalar_bytes(std::uint32_t type) {
  switch (type) {
    case kU8:
    case kI8:
    case kBool:
      return 1;
    case kU16:
    case kI16:
      return 2;
    case kU32:
    case kI32:
    case kF32:
      return 4;
    case kU64:
    case kI64:
    case kF64:
      return 8;
    default:
      return 0;
  }
}

// Reads front to back; never past the end.
class Cursor {
 public:
  Cursor(std::span<const std::byte> bytes, const std::string& file) : bytes_(bytes), file_(file) {}

  std::size_t at() const { return at_; }
  std::size_t left() const { return bytes_.size() - at_; }
  // What is being read, for messages.
  void set_place(std::string place) { place_ = std::move(place); }

  template <typename... Args>
  [[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) const {
    fail<InputError>("{}: {}: {}", file_, place_, fmt::format(format, std::forward<Args>(args)...));
  }

  std::span<const std::byte> take(std::uint64_t count) {
    if (count > left())
      refuse("needs {} bytes at byte {}, the file has {} more (truncated?)", count, at_, left());
    const auto out = bytes_.subspan(at_, static_cast<std::size_t>(count));
    at_ += static_cast<std::size_t>(count);
    return out;
  }
  template <typename T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string_view text() {
    const auto bytes = take(number<std::uint64_t>());
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  // A count of things of which each takes at least `item_bytes`.
  std::uint64_t count(std::size_t item_bytes, const char* what) {
    const auto n = number<std::uint64_t>();
    if (n > left() / item_bytes)
      refuse("{} {} do not fit the {} bytes that are left", n, what, left());
    return n;
  }

 private:
  std::span<const std::byte> bytes_;
  const std::string& file_;
  std::string place_ = "header";
  std::size_t at_ = 0;
};

// One number or truth value of this type, as an integer or a double.
void read_scalar(Cursor& in, std::uint32_t type, std::int64_t* integer, double* number) {
  switch (type) {
    case kU8:
      *integer = in.number<std::uint8_t>();
      return;
    case kI8:
      *integer = in.number<std::int8_t>();
      return;
    case kU16:
      *integer = in.number<std::uint16_t>();
      return;
    case kI16:
      *integer = in.number<std::int16_t>();
      return;
    case kU32:
      *integer = in.number<std::uint32_t>();
      return;
    case kI32:
      *integer = in.number<std::int32_t>();
      return;
    case kI64:
      *integer = in.number<std::int64_t>();
      return;
    case kU64: {
      const auto value = in.number<std::uint64_t>();
      if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
        in.refuse("{} is too large", value);
      *integer = static_cast<std::int64_t>(value);
      return;
    }
    case kBool: {
      const auto value = in.number<std::uint8_t>();
      if (value > 1) in.refuse("{} is no truth value", value);
      *integer = value;
      return;
    }
    case kF32:
      *number = in.number<float>();
      return;
    case kF64:
      *number = in.number<double>();
      return;
    default:
      in.refuse("unknown type {}", type);
  }
}

GgufKind scalar_kind(std::uint32_t type) {
  if (type == kF32 || type == kF64) return GgufKind::kFloat;
  return type == kBool ? GgufKind::kBool : GgufKind::kInteger;
}

GgufValue read_array(Cursor& in) {
  GgufValue value;
  const auto type = in.number<std::uint32_t>();
  if (type == kString) {
    value.kind = GgufKind::kTexts;
    const std::uint64_t n = in.count(8, "texts");
    value.texts.reserve(n);
    for (std::uint64_t i = 0; i < n; ++i) value.texts.push_back(in.text());
    return value;
  }
  const std::size_t item = scalar_bytes(type);
  if (item == 0) in.refuse("an array of type {} is not supported", type);
  const GgufKind kind = scalar_kind(type);
  value.kind = kind == GgufKind::kFloat  ? GgufKind::kFloats
               : kind == GgufKind::kBool ? GgufKind::kBools
                                         : GgufKind::kIntegers;
  const std::uint64_t n = in.count(item, "values");
  for (std::uint64_t i = 0; i < n; ++i) {
    std::int64_t integer = 0;
    double number = 0;
    read_scalar(in, type, &integer, &number);
    if (kind == GgufKind::kFloat)
      value.numbers.push_back(number);
    else
      value.integers.push_back(integer);
  }
  return value;
}

GgufValue read_value(Cursor& in) {
  const auto type = in.number<std::uint32_t>();
  if (type == kArray) return read_array(in);
  GgufValue value;
  if (type == kString) {
    value.kind = GgufKind::kText;
    value.text = in.text();
    return value;
  }
  value.kind = scalar_kind(type);
  read_scalar(in, type, &value.integer, &value.number);
  return value;
}

std::string read_name(Cursor& in, const char* what, std::uint64_t index) {
  in.set_place(fmt::format("{} {}", what, index));
  const std::string_view name = in.text();
  if (name.empty() || name.size() > kMaxName || name.find('\0') != std::string_view::npos)
    in.refuse("a name of {} bytes is not supported", name.size());
  in.set_place(fmt::format("{} '{}'", what, name));
  return std::string(name);
}

// A tensor without its place in memory; offset in *offset.
GgufTensor read_tensor(Cursor& in, std::uint64_t* offset) {
  GgufTensor t;
  const auto axes = in.number<std::uint32_t>();
  if (axes < 1 || axes > kMaxAxes) in.refuse("{} axes, supported are 1 to {}", axes, kMaxAxes);
  std::uint64_t values = 1;
  for (std::uint32_t i = 0; i < axes; ++i) {
    const auto n = in.number<std::uint64_t>();
    if (n == 0 || __builtin_mul_overflow(values, n, &values) || values >> 48 != 0)
      in.refuse("dimension {} of {} is not supported", i, n);
    t.shape.insert(t.shape.begin(), static_cast<std::int64_t>(n));
  }
  const auto id = in.number<std::uint32_t>();
  const auto* row = std::find_if(std::begin(kTensorTypes), std::end(kTensorTypes),
                                 [id](const TensorTypeRow& r) { return r.id == id; });
  if (row == std::end(kTensorTypes))
    in.refuse("type {} is not supported, only F32, F16, BF16, Q4_1 and Q8_0", id);
  t.type = row->type;
  const std::int64_t columns = t.shape.back();
  if (columns % row->block != 0)
    in.refuse("rows of {} values are no whole blocks of {}", columns, row->block);
  t.bytes = values / static_cast<std::uint64_t>(columns) *
            static_cast<std::uint64_t>(stored_bytes(t.type, columns));
  *offset = in.number<std::uint64_t>();
  return t;
}

std::uint64_t alignment_of(const GgufFile& f) {
  const auto alignment = static_cast<std::uint64_t>(
      f.integer("general.alignment", static_cast<std::int64_t>(kDefaultAlignment)));
  if (alignment < 8 || alignment > kMaxAlignment || (alignment & (alignment - 1)) != 0)
    fail<InputError>("{}: key 'general.alignment': {} is no power of two from 8 to {}", f.file,
                     alignment, kMaxAlignment);
  return alignment;
}

void place_tensors(GgufFile& f, const std::map<std::string, std::uint64_t>& offsets,
                   std::size_t header_bytes) {
  const std::uint64_t alignment = alignment_of(f);
  const std::uint64_t begin = (header_bytes + alignment - 1) / alignment * alignment;
  const std::uint64_t size = f.map.bytes.size() > begin ? f.map.bytes.size() - begin : 0;
  std::vector<std::pair<std::uint64_t, std::string>> order;
  for (const auto& [name, offset] : offsets) order.emplace_back(offset, name);
  std::sort(order.begin(), order.end());
  std::uint64_t end = 0;
  for (const auto& [offset, name] : order) {
    GgufTensor& t = f.tensors.at(name);
    if (offset % alignment != 0)
      fail<InputError>("{}: tensor '{}': offset {} is no multiple of {}", f.file, name, offset,
                       alignment);
    if (offset > size || t.bytes > size - offset)
      fail<InputError>("{}: tensor '{}': {} bytes at {}, the data has {} (truncated?)", f.file,
                       name, t.bytes, offset, size);
    if (offset < end)
      fail<InputError>("{}: tensor '{}' overlaps the tensor before it", f.file, name);
    end = offset + t.bytes;
    t.data = f.map.bytes.data() + begin + offset;
  }
}

}  // namespace

const GgufValue* GgufFile::find(std::string_view key, GgufKind kind) const {
  const auto found = keys.find(key);
  if (found == keys.end()) return nullptr;
  if (found->second.kind != kind) {
    static constexpr const char* kNames[] = {"an integer", "a float", "a truth value", "a text",
                                             "integers",   "floats",  "truth values",  "texts"};
    fail<InputError>("{}: key '{}' holds {}, expected {}", file, key,
                     kNames[static_cast<int>(found->second.kind)], kNames[static_cast<int>(kind)]);
  }
  return &found->second;
}

const GgufValue& GgufFile::at(std::string_view key, GgufKind kind) const {
  const GgufValue* value = find(key, kind);
  if (value == nullptr) fail<InputError>("{}: key '{}' is missing", file, key);
  return *value;
}

std::int64_t GgufFile::integer(std::string_view key, std::int64_t fallback) const {
  const GgufValue* value = find(key, GgufKind::kInteger);
  return value == nullptr ? fallback : value->integer;
}

GgufFile open_gguf(const std::filesystem::path& path) {
  GgufFile f;
  f.map = map_file(path);
  f.file = path.string();
  Cursor in(f.map.bytes, f.file);
  const auto magic = in.take(4);
  if (std::memcmp(magic.data(), "GGUF", 4) != 0)
    fail<InputError>("{}: not a GGUF file: it does not begin with 'GGUF'", f.file);
  const auto version = in.number<std::uint32_t>();
  if (version != kVersion)
    in.refuse("version {} is not supported, only {} (little endian)", version, kVersion);
  const auto tensors = in.number<std::uint64_t>(), keys = in.number<std::uint64_t>();
  if (keys > in.left() / 13 || tensors > in.left() / 32)
    in.refuse("{} keys and {} tensors do not fit {} bytes", keys, tensors, in.left());
  for (std::uint64_t i = 0; i < keys; ++i) {
    std::string name = read_name(in, "key", i);
    GgufValue value = read_value(in);
    if (!f.keys.emplace(std::move(name), std::move(value)).second) in.refuse("it is there twice");
  }
  std::map<std::string, std::uint64_t> offsets;
  for (std::uint64_t i = 0; i < tensors; ++i) {
    const std::string name = read_name(in, "tensor", i);
    std::uint64_t offset = 0;
    GgufTensor tensor = read_tensor(in, &offset);
    if (!f.tensors.emplace(name, std::move(tensor)).second) in.refuse("it is there twice");
    offsets.emplace(name, offset);
  }
  place_tensors(f, offsets, in.at());
  return f;
}

}  // namespace lockstep::model
