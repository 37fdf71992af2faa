// Training sequences by index: example i is a pure function of (config, i), so that a resumed run
// sees the same data.
#pragma once

#include <algorithm>

#include "data/trajectory.h"
#include "loop/config.h"
#include "model/tokenizer.h"
#include "rl/tasks.h"

namespace lockstep::loop {

class Corpus {
 public:
  // Reads pretrain.data_path (text: a file, or all files of a folder in order of their names; the
  // last twentieth is held out unless pretrain.validation_path is given), or sets up the mixture of
  // built-in demonstrations.
  Corpus(const RunConfig& config, const model::Tokenizer& tokenizer);

  data::TrainSequence train(std::int64_t i) const;
  data::TrainSequence validation(std::int64_t i) const;
  std::int64_t validation_size() const;  // windows or examples held out
  const std::string& description() const { return description_; }

 private:
  // A byte is a token of a byte tokenizer; the text of another one is kept as its tokens.
  struct Text {
    std::string bytes;
    std::vector<std::int32_t> tokens;
    std::size_t size() const { return std::max(bytes.size(), tokens.size()); }
  };
  Text tokenized(std::string text) const;
  data::TrainSequence window(const Text& text, std::size_t begin) const;
  data::TrainSequence answered(data::Prompt prompt) const;
  data::TrainSequence demonstration(std::int64_t i, bool held_out) const;

  const model::Tokenizer& tokenizer_;
  std::uint64_t seed_;
  std::int64_t length_;
  std::string description_;
  Text text_, held_out_text_;
  std::vector<data::Prompt> examples_, held_out_examples_;
  std::vector<std::pair<double, rl::TaskConfig>> mixture_;  // cumulative share, task
};

}  // namespace lockstep::loop
