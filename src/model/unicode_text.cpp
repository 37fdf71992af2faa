#include "model/unicode_text.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "model/unicode_tables.h"

namespace lockstep::model {

namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

struct Sequence {
  std::size_t have;  // bytes of the character, or of the maximal ill-formed part
  bool good;         // the character is complete
  bool cut;          // ended by the end of the text: more bytes could complete it
};

// What stands at bytes[i].
Sequence sequence_at(std::string_view bytes, std::size_t i) {
  const auto at = [&](std::size_t k) {
    return k < bytes.size() ? static_cast<unsigned char>(bytes[k]) : 0u;
  };
  const unsigned lead = at(i);
  if (lead < 0x80) return {1, true, false};
  if (lead < 0xC2 || lead > 0xF4) return {1, false, false};
  // Length of the sequence and the range of its second byte; later bytes are 80..BF.
  const std::size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  unsigned low = 0x80, high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (std::size_t have = 1; have < length; ++have) {
    const unsigned next = at(i + have);
    if (next < low || next > high) return {have, false, i + have >= bytes.size()};
    low = 0x80, high = 0xBF;
  }
  return {length, true, false};
}

// Bytes from `i` on that are ASCII, eight at a time.
std::size_t skip_ascii(std::string_view text, std::size_t i) {
  for (std::uint64_t word; i + 8 <= text.size(); i += 8) {
    std::memcpy(&word, text.data() + i, 8);
    if (word & 0x8080808080808080ull) break;
  }
  while (i < text.size() && static_cast<unsigned char>(text[i]) < 0x80) ++i;
  return i;
}

bool is_inert(std::uint32_t c) {
  const auto* at = std::upper_bound(std::begin(kInert), std::end(kInert), c,
                                    [](std::uint32_t x, const Range& r) { return x < r.first; });
  return at != std::begin(kInert) && c <= (at - 1)->last;
}

// utf8proc_map would do all of this, but in a time that is quadratic in a run of marks.
void append_normal_form(std::string& out, std::string_view text, NormalForm form) {
  if (text.empty()) return;
  const bool compose = form == NormalForm::kNfc || form == NormalForm::kNfkc;
  const bool compatible = form == NormalForm::kNfkc || form == NormalForm::kNfkd;
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE |
                                                      (compatible ? UTF8PROC_COMPAT : 0));
  std::vector<utf8proc_int32_t> points;
  points.reserve(text.size());
  for (std::size_t i = 0; i < text.size();) {
    utf8proc_int32_t parts[32];  // the longest decomposition has 18 characters
    int unused = 0;
    const auto n = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(next_code_point(text, i)),
                                           parts, 32, options, &unused);
    LOCKSTEP_CHECK(n >= 0 && n <= 32, "utf8proc: {}", n);
    points.insert(points.end(), parts, parts + n);
  }
  const auto combining_class = [](utf8proc_int32_t c) {
    return utf8proc_get_property(c)->combining_class;
  };
  for (auto mark = points.begin(); mark != points.end();) {
    const auto end =
        std::find_if(mark, points.end(), [&](auto c) { return combining_class(c) == 0; });
    if (end - mark > 1)
      std::stable_sort(mark, end,
                       [&](auto a, auto b) { return combining_class(a) < combining_class(b); });
    mark = end == points.end() ? end : end + 1;
  }
  if (compose) {
    const auto n = utf8proc_normalize_utf32(
        points.data(), static_cast<utf8proc_ssize_t>(points.size()),
        static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    LOCKSTEP_CHECK(n >= 0, "utf8proc: {}", n);
    points.resize(static_cast<std::size_t>(n));
  }
  for (const utf8proc_int32_t c : points) append_utf8(out, static_cast<std::uint32_t>(c));
}

}  // namespace

bool is_valid_utf8(std::string_view bytes) {
  for (std::size_t i = skip_ascii(bytes, 0); i < bytes.size(); i = skip_ascii(bytes, i)) {
    const Sequence s = sequence_at(bytes, i);
    if (!s.good) return false;
    i += s.have;
  }
  return true;
}

std::string valid_utf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  for (std::size_t i = 0; i < bytes.size();) {
    const Sequence s = sequence_at(bytes, i);
    out += s.good ? bytes.substr(i, s.have) : kReplacement;
    i += s.have;
  }
  return out;
}

std::size_t settled_utf8(std::string_view bytes) {
  // An incomplete sequence has at most three bytes.
  for (std::size_t back = std::min<std::size_t>(3, bytes.size()); back > 0; --back) {
    const Sequence s = sequence_at(bytes, bytes.size() - back);
    if (s.cut && s.have == back) return bytes.size() - back;
  }
  return bytes.size();
}

std::uint32_t next_code_point(std::string_view text, std::size_t& at) {
  const auto byte = [&](std::size_t i) {
    return static_cast<std::uint32_t>(static_cast<unsigned char>(text[i]));
  };
  const std::uint32_t lead = byte(at);
  if (lead < 0x80) return at += 1, lead;
  if (lead < 0xE0) return at += 2, (lead & 0x1F) << 6 | (byte(at - 1) & 0x3F);
  if (lead < 0xF0)
    return at += 3, (lead & 0xF) << 12 | (byte(at - 2) & 0x3F) << 6 | (byte(at - 1) & 0x3F);
  return at += 4, (lead & 7) << 18 | (byte(at - 3) & 0x3F) << 12 | (byte(at - 2) & 0x3F) << 6 |
                      (byte(at - 1) & 0x3F);
}

void append_utf8(std::string& text, std::uint32_t code_point) {
  std::uint8_t bytes[4];
  const auto n = utf8proc_encode_char(static_cast<utf8proc_int32_t>(code_point), bytes);
  text.append(reinterpret_cast<const char*>(bytes), static_cast<std::size_t>(n));
}

std::string normal_form(std::string_view text, NormalForm form) {
  std::string out;
  out.reserve(text.size());
  // An inert character is a starter that composes with nothing: the text falls apart there.
  // Runs of ASCII are copied, all but the last character, which may compose with what follows.
  std::size_t begin = 0;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t ascii = skip_ascii(text, i);
    if (ascii > i + 1) {
      append_normal_form(out, text.substr(begin, i - begin), form);
      begin = ascii == text.size() ? ascii : ascii - 1;
      out += text.substr(i, begin - i);
      i = ascii;
      continue;
    }
    const std::size_t here = i;
    if (!is_inert(next_code_point(text, i))) continue;
    append_normal_form(out, text.substr(begin, here - begin), form);
    out += text.substr(here, i - here);
    begin = i;
  }
  append_normal_form(out, text.substr(begin), form);
  return out;
}

std::string lower_case(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t i = 0; i < text.size();) {
    const std::uint32_t c = next_code_point(text, i);
    const auto* special = std::find_if(std::begin(kLower), std::end(kLower),
                                       [c](const Lower& l) { return c >= l.first && c <= l.last; });
    if (special != std::end(kLower)) {
      append_utf8(out, special->lower + (c - special->first));
    } else {
      append_utf8(out, static_cast<std::uint32_t>(utf8proc_tolower(static_cast<int>(c))));
    }
    if (c == 0x130) append_utf8(out, 0x307);
  }
  return out;
}

bool is_white_space(std::uint32_t c) {
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

std::string_view with_stand_ins(std::string_view text, std::string& storage) {
  bool copied = false;
  for (std::size_t i = skip_ascii(text, 0); i < text.size(); i = skip_ascii(text, i)) {
    const auto lead = static_cast<unsigned char>(text[i]);
    if (lead < 0xE0 || (lead >= 0xE4 && lead <= 0xE9) || (lead >= 0xEB && lead <= 0xEF)) {
      i += lead < 0xE0 ? 2 : 3;  // no new character starts so
      continue;
    }
    const std::size_t here = i;
    const std::uint32_t c = next_code_point(text, i);
    const auto* at =
        std::upper_bound(std::begin(kStandIns), std::end(kStandIns), c,
                         [](std::uint32_t x, const StandIn& s) { return x < s.first; });
    if (at == std::begin(kStandIns) || c > (at - 1)->last) continue;
    if (!copied) storage = text;
    copied = true;
    std::string other;
    append_utf8(other, (at - 1)->stand_in);
    storage.replace(here, i - here, other);
  }
  return copied ? std::string_view(storage) : text;
}

const std::array<std::string, 256>& byte_characters() {
  static const std::array<std::string, 256> kCharacters = [] {
    std::array<std::string, 256> characters;
    std::uint32_t next = 0x100;
    for (std::uint32_t b = 0; b < 256; ++b) {
      const bool printable =
          (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF);
      append_utf8(characters[b], printable ? b : next++);
    }
    return characters;
  }();
  return kCharacters;
}

bool bytes_of_characters(std::string_view characters, std::string& bytes) {
  static const std::array<std::int16_t, 0x144> kBytes = [] {
    std::array<std::int16_t, 0x144> table;
    table.fill(-1);
    for (int b = 0; b < 256; ++b) {
      std::size_t at = 0;
      table[next_code_point(byte_characters()[static_cast<std::size_t>(b)], at)] =
          static_cast<std::int16_t>(b);
    }
    return table;
  }();
  bytes.clear();
  for (std::size_t i = 0; i < characters.size();) {
    const std::uint32_t c = next_code_point(characters, i);
    if (c >= kBytes.size() || kBytes[c] < 0) return false;
    bytes += static_cast<char>(kBytes[c]);
  }
  return true;
}

}  // namespace lockstep::model
