// The policy's part of a checkpoint, for a run that starts from FP8 codes.
#include "loop/train_state.h"

#include "loop/temp_dir.h"
#include "model/fp8_import.h"
#include "model/small_checkpoint.h"
#include "sync/refit.h"

namespace lockstep::loop {
namespace {

struct TrainStateTest : TempDirTest {
  // A folder whose scales are not those that quantizing its values would give.
  std::filesystem::path fp8_folder() {
    tensor::Arena workspace;
    const tensor::Context ctx = tensor::cpu_context(workspace, 1);
    model::Weights weights = model::small_weights();
    const auto codes = model::quantized_for(ctx, weights, precision());
    for (std::size_t p = 0; p < codes->fp8.size(); ++p) {
      if (!codes->fp8[p]) continue;
      const tensor::TensorView& scales = codes->forward[p].scales;
      for (std::int64_t i = 0; i < scales.count(); ++i) scales.as<float>()[i] *= 1.37f;
      const tensor::TensorView& codes_p = codes->forward[p].codes_ENK;
      for (std::int64_t i = 0; i < codes_p.count(); ++i)  // no block reaches 448
        if ((codes_p.fp8()[i] & 0x7F) == 0x7E) codes_p.fp8()[i] ^= 0x08;
    }
    model::SaveOptions options;
    options.fp8 = codes.get();
    model::save_checkpoint(weights, nullptr, dir / "fp8", options);
    return dir / "fp8";
  }
  static model::Precision precision() {
    model::Precision p;
    p.fp8 = true;
    return p;
  }
  static policy::Policy start(const std::filesystem::path& folder, tensor::Arena& arena) {
    const tensor::Context ctx = tensor::cpu_context(arena, 1);
    auto weights = std::make_shared<model::Weights>(model::load_checkpoint(folder));
    model::import_folder_fp8(ctx, folder, *weights, precision());
    policy::PolicyOptions options;
    options.precision = precision();
    return policy::make_policy(ctx, weights, options);
  }
};

TEST_F(TrainStateTest, CodesOfAnFp8FileStayUntilTheFirstUpdate) {
  const auto folder = fp8_folder();
  tensor::Arena arenas[3];
  policy::Policy first = start(folder, arenas[0]);
  const std::string codes = sync::weight_checksum(first.view());
  const model::Tokenizer tokenizer = model::byte_tokenizer();
  std::filesystem::create_directories(dir / "before");
  write_train_state(dir / "before", first, tokenizer, {1, 2, 3, ""});  // its one step was skipped
  policy::Policy again = start(folder, arenas[1]);
  EXPECT_EQ(read_train_state(dir / "before", again).step, 1);
  EXPECT_EQ(sync::weight_checksum(again.view()), codes);

  policy::begin_step(first);
  policy::finish_step(first, 1e-3);  // decay alone
  const std::string updated = sync::weight_checksum(first.view());
  EXPECT_NE(updated, codes);
  std::filesystem::create_directories(dir / "after");
  write_train_state(dir / "after", first, tokenizer, {2, 3, 4, ""});
  policy::Policy resumed = start(folder, arenas[2]);
  read_train_state(dir / "after", resumed);
  EXPECT_EQ(sync::weight_checksum(resumed.view()), updated);
}

}  // namespace
}  // namespace lockstep::loop
