#include "loop/train_state.h"

#include <nlohmann/json.hpp>

#include "base/file_io.h"
#include "model/checkpoint.h"
#include "model/safetensors.h"
#include "sync/refit.h"
#include "tensor/device.h"

namespace lockstep::loop {

using base::InputError;
using model::FileDtype;
using tensor::DType;
using tensor::TensorView;

namespace {

FileDtype file_dtype(const TensorView& t) {
  return t.dtype == DType::kBf16 ? FileDtype::kBF16 : FileDtype::kF32;
}

std::vector<std::pair<std::string, TensorView>> slabs(const policy::Policy& p) {
  return {{"master", p.master},
          {"exp_avg", p.m},
          {"exp_avg_sq", p.v},
          {"router_bias", p.weights->router_bias}};
}

}  // namespace

void write_train_state(const std::filesystem::path& folder, const policy::Policy& policy,
                       const model::Tokenizer& tokenizer, const TrainState& state) {
  std::filesystem::create_directories(folder / "policy");
  model::save_checkpoint(model::on_host(*policy.weights), &tokenizer,
                         folder / "policy" / "weights");
  std::vector<model::TensorToWrite> tensors;
  std::vector<tensor::Tensor> copies;  // of slabs on a GPU
  for (const auto& [name, view] : slabs(policy)) {
    std::vector<std::int64_t> shape(view.shape.dim, view.shape.dim + view.shape.rank);
    if (!view.on_host()) copies.push_back(tensor::to_host(view));
    tensors.push_back(
        {name, file_dtype(view), shape, view.on_host() ? view.data : copies.back().view().data});
  }
  model::write_safetensors(folder / "policy" / "optimizer.safetensors", std::move(tensors));
  const nlohmann::json info = {{"current_step", state.step},
                               {"consumed_samples", state.next_prompt},
                               {"total_valid_tokens", state.total_valid_tokens},
                               {"optimizer_step", policy.optimizer_step},
                               {"skipped_consecutive", policy.skipped_consecutive},
                               {"skipped_total", policy.skipped_total},
                               {"weight_version", policy.weights->version},
                               {"reference_checksum", state.reference_checksum},
                               {"contract_version", numerics::kContractVersion},
                               {"weight_checksum", sync::weight_checksum(policy.view())}};
  base::write_file_atomic(folder / "training_info.json", info.dump(2) + "\n");
}

TrainState read_train_state(const std::filesystem::path& folder, policy::Policy& policy) {
  const auto info_path = folder / "training_info.json";
  const auto fail = [&](const std::string& what) {
    base::fail<InputError>("{}: {}", info_path.string(), what);
  };
  TrainState state;
  std::string checksum;
  try {
    const nlohmann::json info = nlohmann::json::parse(base::read_file(info_path, 1 << 20));
    const auto contract = info.at("contract_version").get<int>();
    if (contract != numerics::kContractVersion)
      fail(fmt::format(
          "written under numerics contract {}, this build has {}; its bits cannot be continued",
          contract, numerics::kContractVersion));
    state.step = info.at("current_step").get<std::int64_t>();
    state.next_prompt = info.at("consumed_samples").get<std::int64_t>();
    state.total_valid_tokens = info.at("total_valid_tokens").get<std::int64_t>();
    state.reference_checksum = info.at("reference_checksum").get<std::string>();
    policy.optimizer_step = info.at("optimizer_step").get<std::int64_t>();
    policy.skipped_consecutive = info.at("skipped_consecutive").get<std::int64_t>();
    policy.skipped_total = info.at("skipped_total").get<std::int64_t>();
    policy.weights->version = info.at("weight_version").get<std::uint64_t>();
    checksum = info.at("weight_checksum").get<std::string>();
  } catch (const nlohmann::json::exception& e) {
    fail(e.what());
  }
  const auto file = model::open_safetensors(folder / "policy" / "optimizer.safetensors");
  for (const auto& [name, view] : slabs(policy)) {
    const model::FileTensor& t = file.at(name);
    const std::vector<std::int64_t> shape(view.shape.dim, view.shape.dim + view.shape.rank);
    if (t.shape != shape || t.dtype != file_dtype(view) || t.bytes.size() != view.bytes())
      base::fail<InputError>(
          "{}: tensor {} is {} [{}], this run needs {} [{}]; the checkpoint is of another model or "
          "another "
          "policy.optimizer.moment_dtype",
          file.path.string(), name, model::dtype_name(t.dtype), fmt::join(t.shape, ", "),
          model::dtype_name(file_dtype(view)), fmt::join(shape, ", "));
    tensor::copy_bytes(policy.ctx, t.bytes.data(), tensor::Device::kCpu, view.data, view.device,
                       t.bytes.size());
  }
  // Before the first update the weights are still those that the run started from, an FP8 file's
  // codes as they are; later all codes come from the BF16 weights.
  if (policy.optimizer_step > 0) policy::publish(policy);
  const std::string found = sync::weight_checksum(policy.view());
  if (found != checksum)
    fail(
        fmt::format("weight checksum is {} after loading, {} was saved; the precision settings "
                    "differ, a file was changed, or an earlier build saved it",
                    found, checksum));
  return state;
}

}  // namespace lockstep::loop
