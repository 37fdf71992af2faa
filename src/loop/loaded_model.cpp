#include "loop/loaded_model.h"

#include "loop/log.h"
#include "loop/progress.h"
#include "loop/setup.h"
#include "model/fp8_import.h"

namespace lockstep::loop {

std::unique_ptr<LoadedModel> load_model(const ModelOptions& options) {
  if (!std::filesystem::is_directory(options.folder))
    base::fail<base::InputError>("--model: there is no folder '{}'", options.folder.string());
  auto m = std::make_unique<LoadedModel>();
  RunConfig config;
  config.device = options.device;
  config.num_threads = options.num_threads;
  m->ctx = make_context(config, m->workspace);
  const model::Log log = [](const std::string& line) { stderr_log().warn(line); };
  const model::Checkpoint checkpoint = model::open_checkpoint(options.folder, log);
  m->weights = model::make_weights(checkpoint.config);
  model::move_to(m->ctx, m->weights);
  model::read_weights(m->ctx, checkpoint, m->weights, byte_bar("reading"));
  model::Precision precision = model::precision_of(checkpoint);
  if (!options.precision.empty()) {
    const bool fp8 = model::parse_precision(options.precision, "--precision");
    if (fp8 != precision.fp8) precision = {};
    precision.fp8 = fp8;
  }
  if (precision.fp8 && model::has_fp8(checkpoint))
    model::import_fp8(m->ctx, checkpoint, m->weights, precision, log);
  m->quantized = model::quantized_for(m->ctx, m->weights, precision);
  m->rope = model::make_rope_tables(m->ctx, m->weights.config);
  return m;
}

}  // namespace lockstep::loop
