// Checkpoints whose experts lie in one slab a layer, as transformers 5 keeps them.
#include "model/fp8_checkpoint_case.h"
#include "numerics/formats.h"

namespace lockstep::model {
namespace {

using numerics::Bf16;

// The slabs of transformers 5: gate rows before up rows; [E, 2F, D] or the last axes swapped.
struct FusedCheckpoint : Fp8Checkpoint {
  static std::vector<char> bytes_of(const TensorToWrite& row) {
    std::size_t count = dtype_item_bytes(row.dtype);
    for (const auto n : row.shape) count *= static_cast<std::size_t>(n);
    const char* at = static_cast<const char*>(row.data);
    return {at, at + count};
  }
  // Stacks the experts' tensors ("": weights, "_scale_inv": scales) and takes them out.
  static void fuse(Tensors& t, bool swapped, const std::string& kind) {
    for (int l = 0; l < 2; ++l) {
      const std::string base = "model.layers." + std::to_string(l) + ".mlp.experts.";
      for (const bool down : {false, true}) {
        std::vector<char> all;
        std::vector<std::int64_t> shape;
        FileDtype dtype = FileDtype::kBF16;
        for (int e = 0; e < 3; ++e) {
          std::vector<char> plane;
          std::int64_t rows = 0, columns = 0;
          for (const char* which : {"gate_proj", "up_proj", "down_proj"}) {
            if (down != (std::string(which) == "down_proj")) continue;
            const std::string name = base + std::to_string(e) + "." + which + ".weight" + kind;
            const TensorToWrite& row = t.rows.at(name);
            dtype = row.dtype;
            rows += row.shape[0], columns = row.shape[1];
            const auto bytes = bytes_of(row);
            plane.insert(plane.end(), bytes.begin(), bytes.end());
            t.rows.erase(name);
          }
          const std::size_t item = dtype_item_bytes(dtype);
          shape = swapped ? std::vector<std::int64_t>{3, columns, rows}
                          : std::vector<std::int64_t>{3, rows, columns};
          if (swapped) {
            std::vector<char> turned(plane.size());
            for (std::int64_t r = 0; r < rows; ++r)
              for (std::int64_t c = 0; c < columns; ++c)
                std::memcpy(&turned[(c * rows + r) * item], &plane[(r * columns + c) * item], item);
            plane = turned;
          }
          all.insert(all.end(), plane.begin(), plane.end());
        }
        t.put(base + (down ? "down_proj" : "gate_up_proj") + kind, dtype, shape, all);
      }
    }
  }
};

TEST_F(FusedCheckpoint, both_axis_orders_are_read) {
  for (const std::int64_t width : {100, 136, 200}) {  // 2 * 100 and 200 equal the hidden size
    ModelConfig c = ragged_config();
    c.moe_intermediate_size = width;
    weights = make_weights(c);
    initialize(weights, 3);
    save_checkpoint(weights, nullptr, place);
    const Tensors plain(file);
    for (const bool swapped : {false, true}) {
      SCOPED_TRACE(testing::Message() << width << " " << swapped);
      Tensors t(file);
      fuse(t, swapped, "");
      t.write(file);
      EXPECT_TRUE(same_bytes(load_checkpoint(place), weights));
      plain.write(file);
    }
  }
  Tensors t(file);
  fuse(t, false, "");
  t.rows["model.layers.0.mlp.experts.gate_up_proj"].shape = {2, 600, 200};
  t.write(file);
  expect_load_refused({file.string(), "model.layers.0.mlp.experts.gate_up_proj", "[2, 600, 200]"});
  t.rows.erase("model.layers.0.mlp.experts.down_proj");
  t.write(file);
  expect_load_refused({file.string(), "model.layers.0.mlp.experts.down_proj", "missing"});
}

// transformers calls Mixtral's block `mlp` in memory; on disk it is block_sparse_moe.
TEST_F(FusedCheckpoint, mixtral_slabs_may_have_the_name_that_they_have_in_memory) {
  for (const std::string block : {"m.mlp.", "m.block_sparse_moe."}) {
    std::vector<float> gate_up(2 * 4 * 3), down(2 * 3 * 2);
    for (std::size_t i = 0; i < gate_up.size(); ++i) gate_up[i] = static_cast<float>(i);
    for (std::size_t i = 0; i < down.size(); ++i) down[i] = 100 + static_cast<float>(i);
    write_safetensors(file,
                      {{block + "experts.gate_up_proj", FileDtype::kF32, {2, 4, 3}, gate_up.data()},
                       {block + "experts.down_proj", FileDtype::kF32, {2, 3, 2}, down.data()}});
    const HfFolder f = open_hf_folder(place);
    std::set<std::string> used;
    const auto first = [&](const char* which, std::int64_t rows, std::int64_t columns) {
      const StoredWeight w = find_weight(f, std::string("m.block_sparse_moe.experts.1.") + which,
                                         rows, columns, false, 2, used);
      std::vector<Bf16> out(static_cast<std::size_t>(rows * columns));
      read_rows(w, 0, rows, out.data(), columns);
      return numerics::to_float(out[0]);
    };
    EXPECT_EQ(first("w1.weight", 2, 3), 12.0f);
    EXPECT_EQ(first("w3.weight", 2, 3), 18.0f);
    EXPECT_EQ(first("w2.weight", 3, 2), 106.0f);
    EXPECT_EQ(used.size(), 2u);
    expect_refused([&] { first("w4.weight", 2, 3); }, {"w4.weight", "missing"});
  }
}

TEST_F(FusedCheckpoint, fp8_slabs_give_the_codes_of_their_experts) {
  ModelConfig c = ragged_config();
  c.moe_intermediate_size = 256;
  weights = make_weights(c);
  initialize(weights, 3);
  save(place);
  const Loaded apart = load(place, fp8);
  const Tensors plain(file);
  for (const bool swapped : {false, true}) {
    Tensors t(file);
    fuse(t, swapped, "");
    fuse(t, swapped, "_scale_inv");
    t.write(file);
    expect_same_sets(*load(place, fp8).q, *apart.q);
    plain.write(file);
  }
  weights = make_weights(ragged_config());
  initialize(weights, 3);
  save(place);
  Tensors t(file);
  fuse(t, false, "");
  t.write(file);
  expect_load_refused({file.string(), "gate_up_proj", "missing"});
  t.put("model.layers.0.mlp.experts.gate_up_proj_scale_inv", FileDtype::kF32, {1},
        std::vector<char>(4));
  t.write(file);
  expect_load_refused({file.string(), "gate_up_proj", "multiple of 128"});
}

}  // namespace
}  // namespace lockstep::model
