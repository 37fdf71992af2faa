#include "model/convert.h"

#include <fmt/format.h>

#include "apps/verbs.h"
#include "base/error.h"
#include "loop/log.h"
#include "loop/progress.h"

namespace lockstep::apps {

namespace {

struct Options {
  std::string from = "hf", input, output, to, scale_fmt = "float", max_shard_size = "5GB", upcycle;
};

model::StoreAs parse_to(const std::string& to) {
  if (to.empty()) return model::StoreAs::kAsSource;
  return to == "fp8" ? model::StoreAs::kFp8 : model::StoreAs::kBf16;
}

}  // namespace

void add_convert(CLI::App& app) {
  CLI::App* verb = app.add_subcommand(
      "convert", "a checkpoint to another format: BF16, block-FP8, shards, GGUF to Hugging Face");
  static Options o;
  verb->add_option("--from", o.from, "format of the input")
      ->check(CLI::IsMember({"hf", "gguf"}))
      ->capture_default_str();
  verb->add_option("--input", o.input, "a checkpoint folder, or a GGUF file")->required();
  verb->add_option("--output", o.output,
                   "folder to write; a checkpoint that stands there is "
                   "replaced")
      ->required();
  verb->add_option("--to", o.to, "bf16 or fp8; without it FP8 stays FP8 and the rest becomes BF16")
      ->check(CLI::IsMember({"bf16", "fp8"}));
  verb->add_option("--scale-fmt", o.scale_fmt, "of new FP8 scales; ue8m0: powers of two")
      ->check(CLI::IsMember({"float", "ue8m0"}))
      ->capture_default_str();
  verb->add_option("--max-shard-size", o.max_shard_size, "largest file, for example 5GB or 500MB")
      ->capture_default_str();
  verb->add_option("--upcycle", o.upcycle,
                   "experts=8,top_k=2: a mixture of experts from a dense model");
  verb->footer(
      "Example: lockstep convert --from gguf --input SmolLM2.gguf --output models/smollm2\n"
      "The same input and options give the same bytes. Formats: docs/checkpoints.md.");
  verb->callback([] {
    model::ConvertOptions options;
    options.to = parse_to(o.to);
    options.ue8m0 = o.scale_fmt == "ue8m0";
    options.max_shard_bytes = model::parse_byte_size(o.max_shard_size, "--max-shard-size");
    options.progress = loop::byte_bar("converting");
    model::ModelSource source = o.from == "gguf"
                                    ? model::open_gguf_source(o.input)
                                    : model::open_hf_source(o.input, [](const std::string& line) {
                                        loop::stderr_log().warn(line);
                                      });
    if (!o.upcycle.empty()) model::upcycle(source, model::parse_upcycle(o.upcycle, "--upcycle"));
    model::convert(source, o.output, options);
    fmt::print("{}: {} tensors, {}\n", o.output, source.tensors.size(),
               source.config.at("architectures").at(0).get<std::string>());
  });
}

}  // namespace lockstep::apps
