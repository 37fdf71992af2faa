// What goes wrong outside lockstep ends with a message that names the place, a code other than 0,
// and nothing lost.
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>

#include "apps/tiny_run.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

struct Faults : TinyRunTest {
  const Words four = {"checkpointing.enabled=true", "grpo.max_num_steps=4"};
  const Words on_to_six = {"checkpointing.enabled=true", "grpo.max_num_steps=6", "--resume",
                           "auto"};

  // The run ends with this code and all of these texts, and leaves no half written metrics.
  void expect_fault(const Words& more, int code, const Words& texts,
                    const std::string& name = "fault") const {
    const Outcome out = run(rl(name, more));
    EXPECT_EQ(out.code, code) << joined(more) << "\n" << out.text;
    const std::size_t at = out.text.find("lockstep: ");
    const std::string message = at == std::string::npos ? out.text : out.text.substr(at);
    for (const std::string& text : texts)
      EXPECT_TRUE(holds(message, text)) << joined(more) << "\nlacks: " << text << "\n" << message;
    EXPECT_FALSE(holds(message, "internal error")) << joined(more) << "\n" << message;
  }

  static void flip_bit(const fs::path& file) {
    std::string bytes = slurp(file);
    ASSERT_FALSE(bytes.empty()) << file;
    bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 4);
    std::ofstream(file, std::ios::binary) << bytes;
  }

  // models/demo as dir/model, with its safetensors header changed.
  Words damaged_model(const std::function<void(nlohmann::ordered_json&)>& change) const {
    fs::remove_all(dir / "model");
    fs::copy(LOCKSTEP_SOURCE_DIR "/models/demo", dir / "model");
    const std::string bytes = slurp(dir / "model" / "model.safetensors");
    std::uint64_t size = 0;
    std::memcpy(&size, bytes.data(), 8);
    const std::string data = bytes.substr(8 + size);
    auto header = nlohmann::ordered_json::parse(bytes.substr(8, size));
    change(header);
    const std::string text = header.dump();
    size = text.size();
    std::string out(8, '\0');
    std::memcpy(out.data(), &size, 8);
    put("model/model.safetensors", out + text + data);
    return {"policy.model_name=" + (dir / "model").string()};
  }
};

TEST_F(Faults, DamagedCheckpointsFallBackToTheNewestWholeOne) {
  const loop::RunData whole = done("whole", {"grpo.max_num_steps=6"});
  done("base", four);
  const struct {
    const char *name, *file;
    std::function<void(const fs::path&)> damage;
  } cases[] = {
      {"truncated", "policy/optimizer.safetensors",
       [](const fs::path& p) { fs::resize_file(p, fs::file_size(p) - 1); }},
      {"empty", "policy/weights/model.safetensors",
       [](const fs::path& p) { fs::resize_file(p, 0); }},
      {"flipped", "policy/weights/model.safetensors", flip_bit},
      {"manifest", "manifest.json", flip_bit},
      {"gone", "training_info.json", [](const fs::path& p) { fs::remove(p); }},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(c.name);
    fs::copy(dir / "base", dir / c.name, fs::copy_options::recursive);
    c.damage(dir / c.name / "checkpoints/step_4" / c.file);
    const Outcome out = run(rl(c.name, on_to_six));
    ASSERT_EQ(out.code, 0) << out.text;
    EXPECT_TRUE(holds(out.text, std::string("step_4/") + c.file)) << out.text;
    EXPECT_TRUE(holds(out.text, "resuming after step 2")) << out.text;
    expect_equal(whole, loop::read_run(dir / c.name));
  }
  // None whole: nothing is touched.
  for (const char* step : {"step_2", "step_4"})
    flip_bit(dir / "base/checkpoints" / step / "policy/optimizer.safetensors");
  const std::string before = slurp(dir / "base/metrics.jsonl");
  expect_fault(on_to_six, 2,
               {"no checkpoint verifies", "step_2", "step_4", "optimizer.safetensors"}, "base");
  EXPECT_EQ(slurp(dir / "base/metrics.jsonl"), before);
  EXPECT_TRUE(fs::exists(dir / "base/checkpoints/step_4/manifest.json"));
}

TEST_F(Faults, AFullDiskKeepsWhatIsThere) {
  const loop::RunData whole = done("whole", {"grpo.max_num_steps=6"});
  // While saving a checkpoint: a bound on file sizes that the optimizer state does not fit.
  done("save", {"checkpointing.enabled=true", "grpo.max_num_steps=2"});
  const Outcome full = run(rl("save", on_to_six), {}, 1 << 20);
  EXPECT_EQ(full.code, 3) << full.text;
  EXPECT_TRUE(holds(full.text, "checkpoint of step 4 was not saved")) << full.text;
  EXPECT_TRUE(holds(full.text, ".safetensors")) << full.text;
  EXPECT_TRUE(holds(full.text, "file size limit")) << full.text;
  EXPECT_FALSE(fs::exists(dir / "save/checkpoints/step_4"));
  const Outcome rest = run(rl("save", on_to_six));
  EXPECT_EQ(rest.code, 0) << rest.text;
  expect_equal(whole, loop::read_run(dir / "save"));

  // While appending metrics: the third row or so does not fit, the file ends with a whole row.
  const Words quiet = {"logger.log_rollouts=false", "logger.tensorboard_enabled=false",
                       "grpo.max_num_steps=6"};
  const Outcome row = run(rl("row", quiet), {}, 15000);
  EXPECT_EQ(row.code, 3) << row.text;
  EXPECT_TRUE(holds(row.text, "metrics.jsonl")) << row.text;
  EXPECT_GE(loop::read_metrics(dir / "row/metrics.jsonl").size(), 1u);
  EXPECT_EQ(slurp(dir / "row/metrics.jsonl").back(), '\n');

  fs::create_directories(dir / "device");
  fs::create_symlink("/dev/full", dir / "device/metrics.jsonl");
  expect_fault(quiet, 3, {"metrics.jsonl", "the disk is full"}, "device");
}

TEST_F(Faults, RunFoldersAreGuarded) {
  done("base", four);
  expect_fault(four, 2, {(dir / "base").string(), "already holds a run", "--resume auto"}, "base");
  Words other = on_to_six;
  other.push_back("policy.optimizer.lr=0.002");
  expect_fault(other, 2, {"another configuration", "policy.optimizer.lr: 0.001 -> 0.002"}, "base");
  expect_fault({"--resume", (dir / "absent").string()}, 2, {"absent"}, "base");
  expect_fault({"--resume", (dir / "base/checkpoints/step_2/policy").string()}, 2,
               {"manifest.json"}, "base");
  put("file", "");
  expect_fault({}, 3, {(dir / "file").string()}, "file/run");
  const std::string elsewhere = (dir / "file" / "saves").string();
  expect_fault({"checkpointing.enabled=true", "checkpointing.checkpoint_dir=" + elsewhere}, 3,
               {elsewhere, "checkpointing.checkpoint_dir"}, "elsewhere");
  EXPECT_FALSE(fs::exists(dir / "elsewhere/metrics.jsonl"));  // found before the first step
  put("base/metrics.jsonl", "not a row\n");
  expect_fault(on_to_six, 2, {"metrics.jsonl:1"}, "base");

  Process first(rl("busy", {"grpo.max_num_steps=1000000"}), dir / "first.txt");
  while (first.running() && slurp(dir / "busy/metrics.jsonl").empty())
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  expect_fault({"--resume", "auto", "grpo.max_num_steps=1000000"}, 3,
               {(dir / "busy").string(), "in use by another lockstep process"}, "busy");
  expect_fault({"--fresh"}, 3, {(dir / "busy").string(), "in use"}, "busy");
  EXPECT_TRUE(first.running());
}

// A step whose loss is not finite is skipped; what it saves is not what a resume goes on from.
TEST_F(Faults, AStepThatBlowsUpIsNoCheckpointToResumeFrom) {
  done("burst", {"checkpointing.enabled=true", "checkpointing.save_period=1",
                 "grpo.max_num_steps=2", "policy.optimizer.lr=1e30"});
  const std::string manifest = slurp(dir / "burst/checkpoints/step_2/manifest.json");
  EXPECT_FALSE(nlohmann::json::parse(manifest)["healthy"].get<bool>()) << manifest;
  const Outcome out = run(rl("burst", {"checkpointing.enabled=true", "checkpointing.save_period=1",
                                       "policy.optimizer.lr=1e30", "--resume", "auto"}));
  EXPECT_TRUE(holds(out.text, "step_2: saved as unhealthy")) << out.text;
  EXPECT_TRUE(holds(out.text, "resuming after step 1")) << out.text;
}

TEST_F(Faults, SettingsThatMakeNoSense) {
  const struct {
    Words more, texts;
  } cases[] = {
      {{"grpo.num_prompt_per_step=4"}, {"grpo.num_prompt_per_step", "did you mean"}},
      {{"policy.generation.max_new_tokens=0"}, {"policy.generation.max_new_tokens"}},
      {{"policy.generation.max_new_tokens=48"}, {"policy.generation.max_new_tokens", "no room"}},
      {{"policy.train_global_batch_size=7"}, {"policy.train_global_batch_size", "16 samples"}},
      {{"policy.train_global_batch_size=32"}, {"policy.train_global_batch_size", "16 samples"}},
      {{"policy.train_micro_batch_size=0"}, {"policy.train_micro_batch_size"}},
      {{"policy.logprob_batch_size=-1"}, {"policy.logprob_batch_size"}},
      {{"grpo.num_generations_per_prompt=0"}, {"grpo.num_generations_per_prompt"}},
      {{"policy.max_total_sequence_length=100000"},
       {"policy.max_total_sequence_length", "positions"}},
      {{"grpo.num_prompts_per_step=2147483647", "grpo.num_generations_per_prompt=2147483647"},
       {"grpo.num_prompts_per_step", "grpo.num_generations_per_prompt"}},
      {{"policy.generation.num_blocks=5"}, {"policy.generation.num_blocks", "6"}},
      {{"policy.generation.block_size=0"}, {"policy.generation.block_size"}},
      {{"policy.generation.max_num_batched_tokens=0"},
       {"policy.generation.max_num_batched_tokens"}},
      {{"policy.generation.stop_token_ids=[99999]"}, {"policy.generation.stop_token_ids", "99999"}},
      {{"policy.generation.top_p=0"}, {"policy.generation.top_p"}},
      {{"policy.optimizer.lr=nan"}, {"policy.optimizer.lr"}},
      {{"device=cuda"}, {"device", "cuda", "device=cpu"}},
      {{"device=tpu"}, {"device", "tpu"}},
      {{"env.reward=external"}, {"env.command"}},
      {{"data.train.task=null"}, {"data.train.task"}},
      {{"data.train.length_min=9", "data.train.length_max=3"}, {"data.train.length_min"}},
      // A generated prompt that leaves no room for a response.
      {{"data.train.length_min=60", "data.train.length_max=64"},
       {"policy.max_total_sequence_length"}},
      {{"loss_fn.use_importance_sampling_correction=true"},
       {"truncated_importance_sampling_ratio"}},
      {{"policy.fp8_cfg.recipe=blokwise"}, {"policy.fp8_cfg.recipe", "blockwise"}},
  };
  for (const auto& c : cases) expect_fault(c.more, 2, c.texts);
  EXPECT_FALSE(fs::exists(dir / "fault"));  // found before anything was written
  EXPECT_EQ(run({"rl"}).code, 2);
  EXPECT_TRUE(holds(run({"rl"}).text, "policy.model_name is missing")) << run({"rl"}).text;
}

TEST_F(Faults, DataFiles) {
  const auto with = [&](const std::string& name) -> Words {
    return {"data.train.task=null", "data.train.data_path=" + (dir / name).string()};
  };
  put("broken.jsonl", "{\"prompt\": \"a\", \"label\": \"b\"}\n{\"prompt\": \"a\", \"label\"\n");
  put("key.jsonl", "{\"prompt\": \"a\", \"label\": \"b\"}\n{\"question\": \"a\"}\n");
  put("empty.jsonl", "");
  put("long.jsonl", "{\"prompt\": \"a\", \"label\": \"b\"}\n{\"prompt\": \"" +
                        std::string(48, 'x') + "\", \"label\": \"b\"}\n");
  expect_fault(with("broken.jsonl"), 2, {"broken.jsonl:2"});
  expect_fault(with("key.jsonl"), 2, {"key.jsonl:2", "prompt"});
  expect_fault(with("empty.jsonl"), 2, {"empty.jsonl"});
  expect_fault(with("absent.jsonl"), 2, {"absent.jsonl"});
  expect_fault(with("long.jsonl"), 2,
               {"long.jsonl, prompt 2", "48 tokens", "policy.max_total_sequence_length"});
}

TEST_F(Faults, Models) {
  using Json = nlohmann::ordered_json;
  const auto last_tensor = [](Json& header) -> Json& {
    Json* last = nullptr;
    for (auto& [name, tensor] : header.items())
      if (name != "__metadata__") last = &tensor;
    return *last;
  };
  const auto name_of_last = [](const Json& header) { return header.rbegin().key(); };
  std::string last;
  // The rebuilt file itself is fine.
  const Outcome fine = run(rl("fine", damaged_model([](Json&) {})));
  EXPECT_EQ(fine.code, 0) << fine.text;
  Words model = damaged_model([&](Json& header) {
    last = name_of_last(header);
    Json& t = last_tensor(header);
    const auto begin = t["data_offsets"][0].get<std::uint64_t>();
    t["data_offsets"] = {begin - 2, t["data_offsets"][1].get<std::uint64_t>() - 2};
  });
  expect_fault(model, 2, {"model.safetensors", last, "overlap"});
  model = damaged_model([&](Json& header) {
    last_tensor(header)["data_offsets"] = {18446744073709551614ull, 18446744073709551615ull};
  });
  expect_fault(model, 2, {"model.safetensors", last});
  model = damaged_model([&](Json& header) {
    last_tensor(header)["shape"] = {4294967296ull, 4294967296ull};
  });
  expect_fault(model, 2, {"model.safetensors", last});
  model = damaged_model([&](Json& header) { header.erase(last); });
  expect_fault(model, 2, {"model.safetensors"});
  model = damaged_model([](Json&) {});
  fs::resize_file(dir / "model/model.safetensors", 1000);
  expect_fault(model, 2, {"model.safetensors"});
  put("model/config.json", "{\"hidden_size\": 128,");
  expect_fault(model, 2, {"config.json"});
  fs::remove(dir / "model/tokenizer.json");
  expect_fault(model, 2, {"tokenizer"});
  expect_fault({"policy.model_name=" + (dir / "absent").string()}, 2, {(dir / "absent").string()});
}

TEST_F(Faults, AnotherReferenceModelDoesNotResume) {
  const Words model = damaged_model([](nlohmann::ordered_json&) {});
  Words first = model, second = model;
  for (Words* words : {&first, &second})
    words->insert(words->end(),
                  {"checkpointing.enabled=true", "loss_fn.reference_policy_kl_penalty=0.01"});
  first.push_back("grpo.max_num_steps=2");
  second.insert(second.end(), {"grpo.max_num_steps=3", "--resume", "auto"});
  done("fault", first);
  const fs::path weights = dir / "model" / "model.safetensors";
  const std::string before = slurp(weights);
  std::string after = before;
  after[after.size() - 999] = static_cast<char>(after[after.size() - 999] ^ 1);  // an exponent
  std::ofstream(weights, std::ios::binary) << after;
  expect_fault(second, 2, {"policy.model_name", "reference"});
  std::ofstream(weights, std::ios::binary) << before;
  EXPECT_EQ(run(rl("fault", second)).code, 0);
}

TEST_F(Faults, ExternalRewards) {
  const auto with = [&](const std::string& script) -> Words {
    return {"env.reward=external", "env.command=[sh, " + put("reward.sh", script).string() + "]",
            "env.timeout_s=0.5"};
  };
  expect_fault(with("echo no such luck >&2; exit 3"), 3,
               {"external reward", "status 3", "no such luck"}, "crash");
  const auto start = std::chrono::steady_clock::now();
  expect_fault(with("sleep 100"), 3, {"external reward", "time limit of 0.5 s"}, "hang");
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  expect_fault(with("cat >/dev/null; echo hello"), 2, {"external reward", "hello"}, "talk");
  // One that crashes later costs the steps since the last checkpoint and no more.
  const std::string count = (dir / "count").string();
  const std::string once = "echo x >> " + count + "; test $(wc -l < " + count +
                           ") -ne 7 || exit 9; sed 's/.*/{\"score\": 1}/'";
  Words more = with(once);
  for (const char* word :
       {"checkpointing.enabled=true", "grpo.max_num_steps=6", "env.timeout_s=60"})
    more.push_back(word);
  expect_fault(more, 3, {"status 9"}, "later");
  more.insert(more.end(), {"--resume", "auto"});
  const Outcome out = run(rl("later", more));
  EXPECT_EQ(out.code, 0) << out.text;
  EXPECT_TRUE(holds(out.text, "resuming after step ")) << out.text;
}

// Without a GPU `cuda` is refused in words, and `auto` takes the CPU and says why.
TEST_F(Faults, AGpuThatIsNotThere) {
  const Words no_gpu = {"CUDA_VISIBLE_DEVICES="};
  const Outcome cuda = run(rl("cuda", {"device=cuda"}), no_gpu);
  EXPECT_EQ(cuda.code, 2) << cuda.text;
  EXPECT_TRUE(holds(cuda.text, "lockstep: device: cuda was asked for, but ")) << cuda.text;
  EXPECT_TRUE(holds(cuda.text, "use device=auto or device=cpu")) << cuda.text;
  EXPECT_FALSE(fs::exists(dir / "cuda" / "metrics.jsonl"));
  const Outcome automatic = run(rl("auto", {"device=auto"}), no_gpu);
  EXPECT_EQ(automatic.code, 0) << automatic.text;
  const std::size_t at = automatic.text.find("machine  cpu: ");
  ASSERT_NE(at, std::string::npos) << automatic.text;
  const std::string line = automatic.text.substr(at, automatic.text.find('\n', at) - at);
  EXPECT_TRUE(holds(line, "GPU") || holds(line, "no CUDA backend")) << line;
  const Outcome cpu = run(rl("cpu", {"device=cpu"}), no_gpu);
  EXPECT_EQ(cpu.code, 0) << cpu.text;
  EXPECT_FALSE(holds(cpu.text, "GPU")) << cpu.text;
  TinyRunTest::expect_equal(loop::read_run(dir / "cpu"), loop::read_run(dir / "auto"));
}

}  // namespace
}  // namespace lockstep
