#define PCRE2_CODE_UNIT_WIDTH 8
#include "model/regex.h"

#include <pcre2.h>

#include "base/error.h"

namespace lockstep::model {

using base::fail;
using base::InputError;
using base::SystemError;

namespace {

// Steps of one search. Patterns in use need a few for each character of a run; a catastrophic one
// reaches this within a second or so.
constexpr std::uint32_t kMatchLimit = 20'000'000;
constexpr std::uint32_t kHeapLimitKiB = 256 << 10;  // of the interpreter, where there is no JIT
constexpr std::size_t kJitStack = 32 << 10, kJitStackLimit = 64 << 20;

struct Free {
  void operator()(pcre2_code* p) const { pcre2_code_free(p); }
  void operator()(pcre2_compile_context* p) const { pcre2_compile_context_free(p); }
  void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
  void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
  void operator()(pcre2_jit_stack* p) const { pcre2_jit_stack_free(p); }
};

PCRE2_SPTR units(std::string_view text) {
  static constexpr unsigned char kNothing = 0;
  return text.data() == nullptr ? &kNothing : reinterpret_cast<PCRE2_SPTR>(text.data());
}

std::string error_text(int code) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

}  // namespace

struct RegexScratch::State {
  std::unique_ptr<pcre2_match_data, Free> data;
  std::unique_ptr<pcre2_match_context, Free> context;
  std::unique_ptr<pcre2_jit_stack, Free> stack;  // made when the machine stack's 32 KiB ran out
};

RegexScratch::RegexScratch() : state(std::make_unique<State>()) {
  state->data.reset(pcre2_match_data_create(1, nullptr));
  state->context.reset(pcre2_match_context_create(nullptr));
  if (!state->data || !state->context) fail<SystemError>("no memory for a regular expression");
  pcre2_set_match_limit(state->context.get(), kMatchLimit);
  pcre2_set_heap_limit(state->context.get(), kHeapLimitKiB);
}

RegexScratch::~RegexScratch() = default;

struct Regex::Code {
  std::unique_ptr<pcre2_code, Free> code;
  bool jit = false;
};

Regex::Regex(std::string_view pattern, std::string where)
    : code_(std::make_unique<Code>()), pattern_(pattern), where_(std::move(where)) {
  const std::string translated = pcre2_pattern(pattern, where_);
  const std::unique_ptr<pcre2_compile_context, Free> context(pcre2_compile_context_create(nullptr));
  if (!context) fail<SystemError>("no memory for a regular expression");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context.get(), 100);
  int error = 0;
  PCRE2_SIZE at = 0;
  code_->code.reset(pcre2_compile(units(translated), translated.size(),
                                  PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                                  &error, &at, context.get()));
  if (!code_->code)
    fail<InputError>("{}: the regular expression '{}' does not compile: {}", where_, pattern_,
                     error_text(error));
  std::uint32_t groups = 0;
  pcre2_pattern_info(code_->code.get(), PCRE2_INFO_BACKREFMAX, &groups);
  if (groups > 0)
    fail<InputError>("{}: the regular expression '{}' has back references, which are not supported",
                     where_, pattern_);
  code_->jit = pcre2_jit_compile(code_->code.get(), PCRE2_JIT_COMPLETE) == 0;
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

bool Regex::find(std::string_view text, std::size_t from, Match& match,
                 RegexScratch& scratch) const {
  RegexScratch::State& s = *scratch.state;
  const auto run = [&] {
    return code_->jit ? pcre2_jit_match(code_->code.get(), units(text), text.size(), from, 0,
                                        s.data.get(), s.context.get())
                      : pcre2_match(code_->code.get(), units(text), text.size(), from,
                                    PCRE2_NO_UTF_CHECK, s.data.get(), s.context.get());
  };
  int found = run();
  if (found == PCRE2_ERROR_JIT_STACKLIMIT && !s.stack) {
    s.stack.reset(pcre2_jit_stack_create(kJitStack, kJitStackLimit, nullptr));
    if (!s.stack) fail<SystemError>("no memory for a regular expression");
    pcre2_jit_stack_assign(s.context.get(), nullptr, s.stack.get());
    found = run();
  }
  if (found == PCRE2_ERROR_NOMATCH) return false;
  if (found < 0)
    fail<InputError>("{}: the regular expression '{}' fails on a text of {} bytes: {}", where_,
                     pattern_, text.size(), error_text(found));
  const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(s.data.get());
  // A look-around with \K could end before it starts; pcre2_pattern refuses \K.
  match = {ends[0], ends[1]};
  return true;
}

}  // namespace lockstep::model
