// Sample transcripts of a run for its report.
#pragma once

#include <filesystem>
#include <string>

namespace lockstep::loop {

// Tables with samples of the first and of the last step that rollouts/train_data_stepN.jsonl hold
// (the first two samples of up to four prompts each), escaped; "" when there are none. Lines that
// are no rollout line are left out and counted.
std::string transcripts_html(const std::filesystem::path& rollouts);

}  // namespace lockstep::loop
