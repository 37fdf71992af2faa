// Scores from a command of the user's.
//
// One call starts the command once (program and arguments, found in PATH, no shell in between: for
// a shell line write ["/bin/sh", "-c", "..."]), writes one JSON line a sample
//   {"prompt": .., "response": .., "label": ..}
// to its standard input, closes it, and expects on standard output one JSON line a sample, in order
//   {"score": number}
// with exit status 0, all within time_limit_s. Bytes that are not UTF-8 reach it as U+FFFD.
//
// A command that cannot be started, exits otherwise, is killed by a signal or exceeds the time is a
// SystemError with the last 2000 bytes of its standard error. Output that is not as above (garbage,
// too few or too many lines, a score that is not a finite number) is an InputError naming the line.
// In every case the command's process group is killed and the command reaped before the call
// returns or throws. A child that leaves its group and keeps the output open holds the call up
// until the time limit at most. The calling process' signal handlers stay as they are.
#pragma once

#include <span>
#include <vector>

#include "rl/rewards.h"

namespace lockstep::rl {

std::vector<double> external_scores(const RewardConfig& config,
                                    std::span<const RewardSample> samples);

}  // namespace lockstep::rl
