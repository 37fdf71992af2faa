#include <fmt/format.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "apps/verbs.h"
#include "base/error.h"
#include "loop/loaded_model.h"
#include "model/tokenizer.h"
#include "rollout/engine.h"

namespace lockstep::apps {

namespace {

using nlohmann::json;

struct Options {
  loop::ModelOptions model;
  std::string prompt, input, system;
  bool chat = false, as_json = false, ignore_eos = false;
  std::uint64_t seed = 0;
  int samples = 1;
  data::SamplingParams sampling;
  rollout::Options engine;
};

std::vector<std::int32_t> prompt_tokens(const model::Tokenizer& tokenizer, const Options& o,
                                        const std::string& text) {
  if (!o.chat) return model::encode(tokenizer, text);
  std::vector<data::Message> messages;
  if (!o.system.empty()) messages.push_back({"system", o.system});
  messages.push_back({"user", text});
  return model::encode(tokenizer, model::chat_text(tokenizer, messages),
                       {.special_in_text = true, .add_special = false});
}

const char* finish_text(data::FinishReason reason) {
  return reason == data::FinishReason::kStop     ? "stop"
         : reason == data::FinishReason::kLength ? "length"
                                                 : "abort";
}

std::vector<std::string> prompts_of(const Options& o) {
  if (o.input.empty()) return {o.prompt};
  std::ifstream in(o.input);
  if (!in) base::fail<base::InputError>("--input: cannot read '{}'", o.input);
  std::vector<std::string> out;
  std::string line;
  for (std::int64_t number = 1; std::getline(in, line); ++number) {
    if (line.empty()) continue;
    const json row = json::parse(line, nullptr, false);
    if (!row.is_object() || !row.contains("prompt") || !row["prompt"].is_string())
      base::fail<base::InputError>("{}, line {}: must be an object with a text \"prompt\"", o.input,
                                   number);
    out.push_back(row["prompt"].get<std::string>());
  }
  if (out.empty()) base::fail<base::InputError>("{}: there is no prompt", o.input);
  return out;
}

void run(Options& o) {
  if (o.prompt.empty() == o.input.empty())
    base::fail<base::InputError>("generate: give either --prompt or --input");
  const auto m = loop::load_model(o.model);
  const model::Tokenizer tokenizer = model::read_tokenizer(o.model.folder);
  if (!o.ignore_eos) o.sampling.stop_token_ids = m->weights.config.eos_token_ids;
  rollout::Engine engine(m->ctx, o.engine, [&](const std::vector<std::int32_t>& ids) {
    return model::decode(tokenizer, ids);
  });
  engine.set_model(m->view(), 0);

  std::vector<rollout::Request> requests;
  const std::vector<std::string> prompts = prompts_of(o);
  for (std::size_t p = 0; p < prompts.size(); ++p)
    for (int sample = 0; sample < o.samples; ++sample) {
      rollout::Request r;
      r.seed = o.seed;
      r.stream = rollout::request_stream(static_cast<std::int64_t>(p), sample);
      r.prompt_id = static_cast<std::int64_t>(p);
      r.sample = sample;
      r.prompt = prompt_tokens(tokenizer, o, prompts[p]);
      r.sampling = o.sampling;
      requests.push_back(std::move(r));
    }

  // One answer is written as it comes; several are written whole, in their order.
  if (requests.size() == 1 && !o.as_json && o.sampling.stop_strings.empty()) {
    model::TokenStream text(tokenizer);
    const auto show = [](const std::string& piece) {
      std::fputs(piece.c_str(), stdout);
      std::fflush(stdout);
    };
    engine.generate(std::move(requests), nullptr,
                    [&](std::int64_t, std::int32_t token) { show(text.push(token)); });
    show(text.finish() + "\n");
    return;
  }
  const auto answers = engine.generate(std::move(requests));
  for (const data::Trajectory& t : answers) {
    if (!o.as_json) {
      fmt::print("{}\n", t.text);
      continue;
    }
    const json line = {{"prompt", prompts[static_cast<std::size_t>(t.prompt_id)]},
                       {"text", t.text},
                       {"prompt_tokens", t.prompt},
                       {"tokens", t.response},
                       {"logprobs", t.logprobs},
                       {"finish_reason", finish_text(t.finish)}};
    fmt::print("{}\n", line.dump(-1, ' ', false, json::error_handler_t::replace));
  }
}

}  // namespace

void add_generate(CLI::App& app) {
  CLI::App* verb = app.add_subcommand("generate", "continue a prompt, or many");
  verb->footer(
      "One prompt with one sample is written as it comes; with --json, --stop or several, whole\n"
      "answers are written in the order of the prompts.\n\n"
      "Example: lockstep generate --model models/smollm2 --chat --prompt 'What is 2+3?'");
  static Options o;
  add_model_options(*verb, o.model);
  verb->add_option("--prompt", o.prompt, "the text to continue");
  verb->add_option("--input", o.input, "JSONL file of prompts: {\"prompt\": \"...\"} a line");
  verb->add_flag("--chat", o.chat,
                 "the prompt is a user's message: put it into the model's template");
  verb->add_option("--system", o.system, "with --chat: the system message");
  verb->add_option("--max-new-tokens", o.sampling.max_new_tokens, "most tokens of an answer")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  verb->add_option("--temperature", o.sampling.temperature, "0: always the most likely token")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  verb->add_option("--top-k", o.sampling.top_k, "0 or less: off")->capture_default_str();
  verb->add_option("--top-p", o.sampling.top_p, "1: off")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  verb->add_option("--min-p", o.sampling.min_p, "0: off")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  verb->add_option("--stop", o.sampling.stop_strings, "texts that end an answer")
      ->allow_extra_args(false);
  verb->add_option("--samples", o.samples, "answers to each prompt")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  verb->add_option("--seed", o.seed, "the same seed gives the same answers")->capture_default_str();
  verb->add_flag("--ignore-eos", o.ignore_eos, "go on after the model's end tokens");
  verb->add_flag("--json", o.as_json, "one JSON object a line, with tokens and log-probabilities");
  verb->callback([] { run(o); });
}

}  // namespace lockstep::apps
