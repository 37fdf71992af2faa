// Prompts from a JSON Lines file: one object a line, blank lines skipped. Three shapes, told apart
// by their keys, in this order:
//
//   {"messages": [{"role": .., "content": ..}, ..], "label": ..}   label may be absent; then the
//       content of a last message of role "assistant" is taken off the prompt and is the label, or
//       else the label is empty
//   {"prompt": text or messages, "label": ..}                      label required
//   {input_key: text, output_key: ..}                              both required
//
// A label is a string, number or boolean (the latter two as their JSON text). The text of a
// conversation is its contents joined by newlines; the messages are kept for a chat template.
// Other keys are ignored. Ids are the positions among the prompts of the file; task is its path.
#pragma once

#include <string>
#include <vector>

#include "data/trajectory.h"

namespace lockstep::rl {

struct JsonlKeys {
  std::string input_key = "input";
  std::string output_key = "output";
};

// A file that cannot be opened or holds no prompts, and a malformed line, are InputErrors naming the
// file, the line (from 1) and the key.
std::vector<data::Prompt> load_jsonl(const std::string& path, const JsonlKeys& keys);

}  // namespace lockstep::rl
