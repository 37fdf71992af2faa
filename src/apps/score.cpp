#include "loop/score.h"

#include <fmt/format.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "apps/verbs.h"
#include "base/error.h"
#include "base/file_io.h"
#include "model/safetensors.h"
#include "model/tokenizer.h"

namespace lockstep::apps {

namespace {

using nlohmann::json;

struct Options {
  loop::ModelOptions model;
  std::string input, output, logits;
};

[[noreturn]] void bad_line(const std::string& file, std::size_t number, const std::string& what) {
  base::fail<base::InputError>("{}, line {}: {}", file, number, what);
}

// The tokenizer is read when the first text asks for it: a folder of tokens alone needs none.
std::vector<std::int32_t> tokens_of(const Options& o, std::optional<model::Tokenizer>& tokenizer,
                                    const std::string& line, std::size_t number) {
  const std::string& file = o.input;
  json row;
  try {
    row = json::parse(line);
  } catch (const json::exception& e) {
    bad_line(file, number, fmt::format("not valid JSON: {}", e.what()));
  }
  if (row.is_object() && row.contains("text") && row["text"].is_string() && row.size() == 1) {
    if (!tokenizer) tokenizer = model::read_tokenizer(o.model.folder);
    return model::encode(*tokenizer, row["text"].get<std::string>());
  }
  if (!row.is_object() || row.size() != 1 || !row.contains("tokens") || !row["tokens"].is_array())
    bad_line(file, number, "must be {\"tokens\": [...]} or {\"text\": \"...\"}");
  std::vector<std::int32_t> tokens;
  for (const json& id : row["tokens"]) {
    if (!id.is_number_integer() || id < 0 || id > INT32_MAX)
      bad_line(file, number, fmt::format("'{}' is no token id", id.dump().substr(0, 40)));
    tokens.push_back(id.get<std::int32_t>());
  }
  return tokens;
}

std::string line_of(const std::vector<std::int32_t>& tokens, const loop::Scored& scored) {
  json logprobs = json::array();
  for (const float x : scored.logprobs)
    logprobs.push_back(std::isfinite(x) ? json(static_cast<double>(x)) : json(nullptr));
  return json{{"tokens", tokens}, {"logprobs", logprobs}, {"sum", scored.sum}}.dump() + "\n";
}

void run(const Options& o) {
  const auto model = loop::load_model(o.model);
  std::ifstream in(o.input);
  if (!in) base::fail<base::InputError>("--input: cannot read '{}'", o.input);
  std::vector<std::vector<std::int32_t>> sequences;
  std::optional<model::Tokenizer> tokenizer;
  std::string line;
  for (std::size_t number = 1; std::getline(in, line); ++number)
    if (!line.empty()) sequences.push_back(tokens_of(o, tokenizer, line, number));
  if (sequences.empty()) base::fail<base::InputError>("{}: there is no line to score", o.input);

  std::vector<float> logits;
  loop::LogitsSink sink;
  const std::size_t length = sequences[0].size();
  const auto V = static_cast<std::size_t>(model->weights.config.vocab_size);
  if (!o.logits.empty()) {
    for (std::size_t s = 0; s < sequences.size(); ++s)
      if (sequences[s].size() != length)
        base::fail<base::InputError>(
            "--logits asks for rows of one length; row 1 has {} tokens, row {} has {}", length,
            s + 1, sequences[s].size());
    logits.resize(sequences.size() * length * V);
    sink = [&](std::size_t s, std::int64_t position, std::int64_t, std::span<const float> values) {
      std::copy(values.begin(), values.end(),
                logits.begin() + static_cast<std::ptrdiff_t>(
                                     (s * length + static_cast<std::size_t>(position)) * V));
    };
  }
  const auto scored = loop::score(*model, sequences, sink);
  std::string out;
  for (std::size_t s = 0; s < sequences.size(); ++s) out += line_of(sequences[s], scored[s]);
  base::write_file_atomic(o.output, out);
  if (!o.logits.empty())
    model::write_safetensors(
        o.logits, {{"logits",
                    model::FileDtype::kF32,
                    {static_cast<std::int64_t>(sequences.size()), static_cast<std::int64_t>(length),
                     static_cast<std::int64_t>(V)},
                    logits.data()}});
}

}  // namespace

void add_model_options(CLI::App& verb, loop::ModelOptions& options) {
  verb.add_option("--model", options.folder, "checkpoint folder")->required();
  verb.add_option("--precision", options.precision,
                  "bf16 or fp8; not given: fp8 where the checkpoint holds FP8, else bf16")
      ->check(CLI::IsMember({"bf16", "fp8"}));
  verb.add_option("--device", options.device, "auto: a GPU where there is one")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  verb.add_option("--threads", options.num_threads, "CPU threads; 0: all cores")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
}

void add_score(CLI::App& app) {
  CLI::App* verb = app.add_subcommand("score", "log-probabilities of given texts or tokens");
  verb->footer(
      "Input lines: {\"tokens\": [...]} or {\"text\": \"...\"}. Output lines, in the same order:\n"
      "{\"tokens\": [...], \"logprobs\": [null, ...], \"sum\": x}; the first token has no\n"
      "log-probability, a null elsewhere is one that is not finite.\n\n"
      "Example: lockstep score --model models/demo --input lines.jsonl --output scores.jsonl");
  static Options o;
  add_model_options(*verb, o.model);
  verb->add_option("--input", o.input, "JSONL file to read")->required();
  verb->add_option("--output", o.output, "JSONL file to write")->required();
  verb->add_option("--logits", o.logits,
                   "safetensors file to write: FP32 'logits' [rows, length, vocabulary]; all rows "
                   "must have one length");
  verb->callback([] { run(o); });
}

}  // namespace lockstep::apps
