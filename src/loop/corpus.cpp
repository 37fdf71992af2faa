#include "loop/corpus.h"

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "base/file_io.h"
#include "base/philox.h"
#include "loop/setup.h"
#include "rl/jsonl.h"

namespace lockstep::loop {

using base::InputError;
using data::TrainSequence;

namespace {

constexpr std::size_t kMaxTextBytes = std::size_t{4} << 30;
constexpr std::uint64_t kWindowStream = 1, kMixtureStream = 2, kExampleStream = 3;

std::string read_text(const std::filesystem::path& path) {
  if (!std::filesystem::is_directory(path)) return base::read_file(path, kMaxTextBytes);
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(path))
    if (entry.is_regular_file()) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  std::string text;
  for (const auto& file : files) text += base::read_file(file, kMaxTextBytes - text.size());
  return text;
}

// Uniform in [0, n), from the stream's element i.
std::uint64_t draw(std::uint64_t seed, std::uint64_t stream, std::int64_t i, std::uint64_t n) {
  const auto words = base::philox4x32(seed, stream, static_cast<std::uint64_t>(i));
  const std::uint64_t wide = (static_cast<std::uint64_t>(words.word[1]) << 32) | words.word[0];
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(wide) * n) >> 64);
}

}  // namespace

Corpus::Corpus(const RunConfig& config, const model::Tokenizer& tokenizer)
    : tokenizer_(tokenizer),
      seed_(static_cast<std::uint64_t>(config.pretrain.seed)),
      length_(config.pretrain.sequence_length) {
  const PretrainConfig& p = config.pretrain;
  if (p.data_path && p.format == "text") {
    std::string text = read_text(*p.data_path), held_out;
    if (p.validation_path) {
      held_out = read_text(*p.validation_path);
    } else {
      const std::size_t cut = text.size() - text.size() / 20;
      held_out = text.substr(cut);
      text.resize(cut);
    }
    text_ = tokenized(std::move(text));
    held_out_text_ = tokenized(std::move(held_out));
    const char* unit = tokenizer.pipeline ? "tokens" : "bytes";
    for (const auto* t : {&text_, &held_out_text_})
      if (t->size() <= static_cast<std::size_t>(length_))
        base::fail<InputError>(
            "{}: {} {} of {} text are fewer than pretrain.sequence_length + 1 = {}", *p.data_path,
            t->size(), unit, t == &text_ ? "training" : "held-out", length_ + 1);
    description_ = fmt::format("{} {} of text from {}, {} held out", text_.size(), unit,
                               *p.data_path, held_out_text_.size());
  } else if (p.data_path) {
    examples_ =
        rl::load_jsonl(*p.data_path, {config.data.train.input_key, config.data.train.output_key});
    if (p.validation_path) {
      held_out_examples_ = rl::load_jsonl(
          *p.validation_path, {config.data.train.input_key, config.data.train.output_key});
    } else {
      const std::size_t held = std::max<std::size_t>(1, examples_.size() / 20);
      if (examples_.size() <= held)
        base::fail<InputError>("{}: too few examples to hold one out", *p.data_path);
      held_out_examples_.assign(examples_.end() - static_cast<std::ptrdiff_t>(held),
                                examples_.end());
      examples_.resize(examples_.size() - held);
    }
    description_ = fmt::format("{} demonstrations from {}, {} held out", examples_.size(),
                               *p.data_path, held_out_examples_.size());
  } else {
    double total = 0;
    for (const auto& [task, share] : p.mixture) total += share;
    double sum = 0;
    for (const auto& [task, share] : p.mixture) {
      DataSourceConfig source = config.data.train;
      source.task = task;
      source.seed = config.pretrain.seed;
      sum += share / total;
      mixture_.emplace_back(sum, task_config(config, source));
      description_ += fmt::format("{}{} {:.0f} %", description_.empty() ? "demonstrations: " : ", ",
                                  task, 100 * share / total);
    }
    if (mixture_.empty())
      base::fail<InputError>(
          "pretrain: give pretrain.data_path or pretrain.mixture (for example {{reverse: 1}})");
  }
}

Corpus::Text Corpus::tokenized(std::string text) const {
  if (!tokenizer_.pipeline) return {std::move(text), {}};
  return {"", model::encode_ordinary(tokenizer_, text)};
}

TrainSequence Corpus::window(const Text& text, std::size_t begin) const {
  const std::size_t count = std::min(static_cast<std::size_t>(length_) + 1, text.size() - begin);
  TrainSequence s;
  if (tokenizer_.pipeline) {
    const auto at = text.tokens.begin() + static_cast<std::ptrdiff_t>(begin);
    s.tokens.assign(at, at + static_cast<std::ptrdiff_t>(count));
  } else {
    s.tokens =
        model::encode_ordinary(tokenizer_, std::string_view(text.bytes).substr(begin, count));
  }
  s.loss_mask.assign(s.tokens.size(), 1.0f);
  s.loss_mask[0] = 0;
  return s;
}

TrainSequence Corpus::answered(data::Prompt prompt) const {
  if (tokenizer_.eos_id < 0)
    base::fail<base::InputError>(
        "the tokenizer names no end of a text; give it an eos_token in tokenizer_config.json");
  encode_prompt(tokenizer_, "", prompt);
  TrainSequence s;
  s.tokens = std::move(prompt.tokens);
  s.loss_mask.assign(s.tokens.size(), 0.0f);
  const auto answer_tokens = model::encode_ordinary(tokenizer_, prompt.label);
  s.tokens.insert(s.tokens.end(), answer_tokens.begin(), answer_tokens.end());
  s.tokens.push_back(tokenizer_.eos_id);
  if (static_cast<std::int64_t>(s.tokens.size()) > length_ + 1)
    s.tokens.resize(static_cast<std::size_t>(length_) + 1);
  s.loss_mask.resize(s.tokens.size(), 1.0f);
  s.loss_mask[0] = 0;
  return s;
}

TrainSequence Corpus::demonstration(std::int64_t i, bool held_out) const {
  const std::int64_t index = held_out ? i + (std::int64_t{1} << 40) : i;
  const double x = static_cast<double>(draw(seed_, kMixtureStream, index, 1u << 30)) / (1u << 30);
  for (const auto& [until, task] : mixture_)
    if (x < until || &task == &mixture_.back().second) {
      const rl::Demonstration d = rl::demonstration(task, index);
      data::Prompt prompt;
      prompt.text = d.prompt;
      prompt.label = d.answer;
      return answered(std::move(prompt));
    }
  base::fail<base::ContractError>("empty mixture");
}

TrainSequence Corpus::train(std::int64_t i) const {
  if (text_.size() > 0)
    return window(text_,
                  draw(seed_, kWindowStream, i, text_.size() - static_cast<std::size_t>(length_)));
  if (!examples_.empty()) {
    return answered(examples_[draw(seed_, kExampleStream, i, examples_.size())]);
  }
  return demonstration(i, false);
}

TrainSequence Corpus::validation(std::int64_t i) const {
  if (held_out_text_.size() > 0)
    return window(held_out_text_, static_cast<std::size_t>(i * length_));
  if (!held_out_examples_.empty()) {
    return answered(held_out_examples_[static_cast<std::size_t>(i)]);
  }
  return demonstration(i, true);
}

std::int64_t Corpus::validation_size() const {
  if (held_out_text_.size() > 0)
    return (static_cast<std::int64_t>(held_out_text_.size()) - 1) / length_;
  if (!held_out_examples_.empty()) return static_cast<std::int64_t>(held_out_examples_.size());
  return std::int64_t{1} << 30;
}

}  // namespace lockstep::loop
