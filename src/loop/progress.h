// What a person sees while a run goes on: one line a step, and below it, on a terminal, a bar that
// is redrawn in place.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "model/hf_write.h"

namespace lockstep::loop {

// "[#####.......]  12/100  3m05s left", at most `width` columns. The time left is extrapolated from
// the steps since `first` (a resumed run starts in the middle); none is shown before one is done.
std::string render_bar(std::int64_t first, std::int64_t done, std::int64_t total, double elapsed_s,
                       int width);

// "850ms", "4.2s", "3m05s", "2h07m".
std::string format_duration(double seconds);

// "reading [====......] 1.25 of 4.98 GB" on standard error while a checkpoint is read or written,
// gone when it is done. Null (nothing is shown) where that is no terminal; nothing either for what
// takes less than a third of a second.
model::Progress byte_bar(const char* what);

class Progress {
 public:
  // Steps first+1..total are to come. The bar appears only when `out` is a terminal.
  Progress(std::FILE* out, std::int64_t first, std::int64_t total);
  ~Progress() { clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Prints the step's line and moves the bar. `elapsed_s` is the time since the run started.
  void step(std::int64_t done, const std::string& line, double elapsed_s);
  // Prints a line that is no step.
  void note(const std::string& line);
  // Takes the bar away, before other output or at the end.
  void clear();

 private:
  void draw();
  std::FILE* out_;
  bool terminal_;
  std::int64_t first_, done_, total_;
  double elapsed_s_ = 0;
  bool drawn_ = false;
};

}  // namespace lockstep::loop
