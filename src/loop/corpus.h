// Training sequences by index: example i is a pure function of (config, i), so that a resumed run
// sees the same data.
#pragma once

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
  data::TrainSequence window(const std::string& text, std::size_t begin) const;
  data::TrainSequence answered(const std::string& prompt, const std::string& answer) const;
  data::TrainSequence demonstration(std::int64_t i, bool held_out) const;

  const model::Tokenizer& tokenizer_;
  std::uint64_t seed_;
  std::int64_t length_;
  std::string text_, held_out_text_, description_;
  std::vector<data::Prompt> examples_, held_out_examples_;
  std::vector<std::pair<double, rl::TaskConfig>> mixture_;  // cumulative share, task
};

}  // namespace lockstep::loop
