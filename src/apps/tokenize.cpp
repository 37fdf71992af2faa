#include <fmt/format.h>

#include <charconv>
#include <iostream>
#include <nlohmann/json.hpp>

#include "apps/verbs.h"
#include "base/error.h"
#include "model/tokenizer.h"

namespace lockstep::apps {

namespace {

using nlohmann::json;

struct Options {
  std::string model;
  bool decode = false, keep_special = false, no_special = false;
};

[[noreturn]] void bad_line(std::int64_t number, const std::string& what) {
  base::fail<base::InputError>("standard input, line {}: {}", number, what);
}

std::vector<std::int32_t> ids_of(const std::string& line, std::int64_t number) {
  json row;
  try {
    row = json::parse(line);
  } catch (const json::exception& e) {
    bad_line(number, fmt::format("not valid JSON: {}", e.what()));
  }
  if (!row.is_array()) bad_line(number, "must be a JSON array of ids");
  std::vector<std::int32_t> ids;
  ids.reserve(row.size());
  for (const json& id : row) {
    if (!id.is_number_integer() || id < 0 || id > INT32_MAX)
      bad_line(number, fmt::format("'{}' is no token id", id.dump().substr(0, 40)));
    ids.push_back(id.get<std::int32_t>());
  }
  return ids;
}

void write_ids(const std::vector<std::int32_t>& ids, std::string& line) {
  line = "[";
  for (const std::int32_t id : ids) {
    char digits[16];
    const auto end = std::to_chars(digits, digits + sizeof digits, id).ptr;
    if (line.size() > 1) line += ", ";
    line.append(digits, end);
  }
  line += "]\n";
  std::cout.write(line.data(), static_cast<std::streamsize>(line.size()));
}

void run(const Options& options) {
  const model::Tokenizer tokenizer = model::read_tokenizer(options.model);
  const model::EncodeOptions encode{.special_in_text = true, .add_special = !options.no_special};
  std::ios::sync_with_stdio(false);
  std::string line, out;
  for (std::int64_t number = 1; std::getline(std::cin, line); ++number) {
    if (options.decode) {
      std::cout
          << json(model::decode(tokenizer, ids_of(line, number), !options.keep_special)).dump()
          << '\n';
    } else {
      write_ids(model::encode(tokenizer, line, encode), out);
    }
  }
  std::cout.flush();
  if (!std::cout) base::fail<base::SystemError>("cannot write to standard output");
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("tokenize", "text lines to token ids, and back");
  verb->add_option("--model", options->model,
                   "a folder with tokenizer.json, or a tokenizer.json of any name")
      ->required();
  auto* no_special =
      verb->add_flag("--no-special", options->no_special,
                     "without the tokens that the post-processor puts around a text");
  auto* decode = verb->add_flag("--decode", options->decode,
                                "the reverse: JSON arrays of ids to JSON strings");
  verb->add_flag("--keep-special", options->keep_special,
                 "with --decode: special tokens as their text, too")
      ->needs(decode);
  decode->excludes(no_special);
  verb->footer(
      "Reads lines of UTF-8 from standard input (a line ends at \\n only; what is not UTF-8 "
      "becomes\n"
      "U+FFFD) and writes one JSON array of ids a line: what encode(line) of the Hugging Face\n"
      "tokenizers package gives with the same file. --decode reads such arrays and writes one "
      "JSON\n"
      "string a line; special tokens and ids that the tokenizer does not have give nothing.\n"
      "Example: lockstep tokenize --model models/demo < text.txt > ids.jsonl");
  verb->callback([options] { run(*options); });
}

}  // namespace lockstep::apps
