// Text in UTF-8: validity, code points, case and normalization forms. Tables: utf8proc (Unicode
// 15), bent to the versions that the Hugging Face `tokenizers` package carries where ids depend on
// it (docs/tokenizers.md).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace lockstep::model {

// True for well-formed UTF-8 (Unicode 15, section 3.9, table 3-7).
bool is_valid_utf8(std::string_view bytes);

// `bytes` with each maximal ill-formed part replaced by U+FFFD.
std::string valid_utf8(std::string_view bytes);

// Length of the longest prefix that further bytes cannot change: all of `bytes` but an incomplete
// sequence at the end that could still become a character.
std::size_t settled_utf8(std::string_view bytes);

// The code point that starts at `at`, which moves behind it. The text must be well-formed.
std::uint32_t next_code_point(std::string_view text, std::size_t& at);
void append_utf8(std::string& text, std::uint32_t code_point);

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };
// As unicode-normalization of Unicode 10 gives it: characters that came later stay as they are.
std::string normal_form(std::string_view text, NormalForm form);

// Each character for itself (no final sigma); U+0130 becomes two.
std::string lower_case(std::string_view text);

// White_Space of Unicode.
bool is_white_space(std::uint32_t code_point);

// PCRE2 10.42 knows Unicode 14, `tokenizers` 16. `text` with each character that came in between
// replaced by an older one of the same general category (and script, for Han) and length, so that a
// match has the same place. `storage` holds the copy; without such a character nothing is copied.
std::string_view with_stand_ins(std::string_view text, std::string& storage);

// The character that stands for a byte in byte-level vocabularies (GPT-2): printable Latin-1 bytes
// are themselves, the others follow from U+0100 in order.
const std::array<std::string, 256>& byte_characters();
// The bytes that a text of such characters stands for; false when it has another character.
bool bytes_of_characters(std::string_view characters, std::string& bytes);

}  // namespace lockstep::model
