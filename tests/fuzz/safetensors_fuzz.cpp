// The safetensors reader, and the reading of weights out of it: FP8 with scales, slabs of experts.
#include "fuzz/fuzz.h"
#include "model/hf_folder.h"

using namespace lockstep;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const fuzz::MemoryFile file(data, size);
  try {
    model::HfFolder f;
    f.fp8 = model::Fp8Format{};
    f.files.push_back(model::open_safetensors(file.path()));
    f.where = file.path().string();
    for (const auto& [name, tensor] : f.files[0].tensors)
      f.tensors.emplace(name, model::HfTensor{tensor, f.where});
    for (const auto& [name, source] : f.tensors) {
      const auto& shape = source.tensor.shape;
      if (shape.size() != 2 || shape[0] > 4096 || shape[1] > 4096) continue;
      for (const char* suffix : {"", ".experts.1.up_proj.weight", ".experts.0.down_proj.weight"}) {
        try {
          std::set<std::string> used;
          const model::StoredWeight w =
              model::find_weight(f, *suffix == 0 ? name : "m" + std::string(suffix), shape[0],
                                 shape[1], false, 2, used);
          std::vector<numerics::Bf16> values(static_cast<std::size_t>(shape[0] * shape[1]));
          model::read_rows(w, 0, shape[0], values.data(), shape[1]);
          if (!w.fp8()) continue;
          std::vector<float> scales(static_cast<std::size_t>(w.scales.rows * w.scales.columns));
          model::read_scales(w, scales.data());
          std::vector<numerics::Fp8> codes(values.size());
          model::read_codes(w, 0, shape[0], codes.data(), shape[1]);
        } catch (const base::InputError&) {
        }
      }
    }
  } catch (const base::InputError&) {
  }
  return 0;
}

static std::string file_of(std::string header, std::size_t bytes) {
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = header.size();
  std::string out(reinterpret_cast<const char*>(&length), 8);
  return out + header + std::string(bytes, '\x38');
}

std::vector<std::string> fuzz::seeds() {
  return {
      file_of(R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16",)"
              R"("shape":[4],"data_offsets":[24,32]},"__metadata__":{"format":"pt"}})",
              32),
      file_of(R"({"m.weight_scale_inv":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},)"
              R"("m.weight":{"dtype":"F8_E4M3","shape":[130,5],"data_offsets":[8,658]}})",
              658),
      file_of(R"({"m.experts.gate_up_proj":{"dtype":"BF16","shape":[2,4,3],"data_offsets":[0,48]},)"
              R"("m.experts.down_proj":{"dtype":"F16","shape":[2,3,2],"data_offsets":[48,72]},)"
              R"("x":{"dtype":"F32","shape":[2,3],"data_offsets":[72,96]},)"
              R"("y":{"dtype":"F8_E4M3","shape":[3,2],"data_offsets":[96,102]}})",
              102),
      file_of("{}", 0),
  };
}

std::vector<std::string> fuzz::words() {
  return {"\"dtype\":",
          "\"shape\":",
          "\"data_offsets\":",
          "__metadata__",
          "F8_E4M3",
          "BF16",
          "F8_E8M0",
          "[0,0]",
          "[",
          "]",
          "{",
          "}",
          ",",
          "-1",
          "1e99",
          "18446744073709551615",
          "9223372036854775808",
          "4294967296",
          "\\ud800",
          "null",
          "true",
          "_scale_inv",
          "\"",
          "0",
          std::string(64, '['),
          "128",
          "\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]},"};
}
