#include "loop/config_load.h"

#include "base/content_hash.h"
#include "base/error.h"
#include "base/file_io.h"
#include "loop/config_read.h"

namespace lockstep::loop {

using base::fail;
using base::InputError;

namespace {

constexpr std::size_t kMaxConfigBytes = 1 << 20;
constexpr int kMaxReferences = 32;

const ConfigKey* find_key(const std::vector<ConfigKey>& keys, const std::string& name) {
  for (const ConfigKey& key : keys)
    if (key.name == name) return &key;
  return nullptr;
}

struct Resolver {
  const std::vector<ConfigKey>& keys;  // slots still hold the defaults
  const ConfigEntries& entries;

  RawValue referred(const std::string& name, const std::string& where, int depth) const {
    const ConfigKey* key = find_key(keys, name);
    if (key == nullptr)
      fail<InputError>("{}: ${{{}}} refers to no key{}", where, name, did_you_mean(name, keys));
    if (depth >= kMaxReferences)
      fail<InputError>("{}: ${{{}}}: references run in a circle", where, name);
    const auto found = entries.find(name);
    if (found == entries.end()) return config_value(*key);
    return resolve(found->second.value, found->second.where, depth + 1);
  }

  std::string text(const std::string& in, const std::string& where, int depth) const {
    std::string out;
    for (std::size_t at = 0; at < in.size();) {
      if (in.compare(at, 3, "$${") == 0) {
        out += "${";
        at += 3;
      } else if (in.compare(at, 2, "${") == 0) {
        const std::size_t end = in.find('}', at);
        if (end == std::string::npos) fail<InputError>("{}: '{}' lacks a closing }}", where, in);
        const RawValue value = referred(in.substr(at + 2, end - at - 2), where, depth);
        if (value.kind != RawValue::kScalar)
          fail<InputError>("{}: '{}' inserts a value that is no plain text", where, in);
        out += value.text;
        if (out.size() > kMaxConfigBytes) fail<InputError>("{}: the text grows too long", where);
        at = end + 1;
      } else {
        out += in[at++];
      }
    }
    return out;
  }

  RawValue resolve(const RawValue& in, const std::string& where, int depth) const {
    // A reference that is the whole value passes lists and null on, too.
    if (in.kind == RawValue::kScalar && in.text.rfind("${", 0) == 0 &&
        in.text.find('}') == in.text.size() - 1)
      return referred(in.text.substr(2, in.text.size() - 3), where, depth);
    RawValue out = in;
    if (in.kind == RawValue::kScalar) out.text = text(in.text, where, depth);
    for (std::string& item : out.items) item = text(item, where, depth);
    for (auto& pair : out.pairs) pair.second = text(pair.second, where, depth);
    return out;
  }
};

// Whether the key changes what a step computes. The last step does when the learning rate decays
// towards it.
bool decides(const ConfigKey& key, const RunConfig& config) {
  const SchedulerConfig& scheduler = config.policy.scheduler;
  if (key.name == "grpo.max_num_steps" || key.name == "pretrain.max_num_steps")
    return scheduler.name != "constant" && !scheduler.total_steps;
  return !key.operational;
}

bool starts_with(const std::string& text, const std::string& prefix) {
  return text.rfind(prefix, 0) == 0;
}

}  // namespace

RunConfig load_config(const std::vector<std::filesystem::path>& files,
                      const std::vector<std::string>& overrides) {
  RunConfig config;
  const std::vector<ConfigKey> keys = config_keys(config);
  ConfigEntries merged;
  for (const auto& file : files)
    for (auto& [key, entry] :
         read_config_yaml(base::read_file(file, kMaxConfigBytes), file.string(), true, keys))
      merged[key] = entry;
  for (const std::string& text : overrides)
    for (auto& [key, entry] : read_config_override(text, keys)) merged[key] = entry;

  ConfigEntries resolved;  // all of it before a slot changes: references see the defaults
  for (const auto& [key, entry] : merged)
    resolved[key] = {Resolver{keys, merged}.resolve(entry.value, entry.where, 0), entry.where};
  for (const auto& [name, entry] : resolved)
    set_config_value(*find_key(keys, name), entry.value, entry.where);
  return config;
}

std::string config_to_yaml(const RunConfig& config, bool with_help) {
  RunConfig copy = config;
  std::string out;
  std::vector<std::string> open;  // the sections of the line before
  for (const ConfigKey& key : config_keys(copy)) {
    std::vector<std::string> parts;
    for (std::size_t at = 0, dot = 0; dot != std::string::npos; at = dot + 1) {
      dot = key.name.find('.', at);
      parts.push_back(key.name.substr(at, dot - at));
    }
    std::size_t same = 0;
    while (same < open.size() && same + 1 < parts.size() && open[same] == parts[same]) ++same;
    open.resize(same);
    for (; same + 1 < parts.size(); ++same) {
      out += std::string(2 * same, ' ') + parts[same] + ":\n";
      open.push_back(parts[same]);
    }
    out += std::string(2 * same, ' ') + parts.back() + ": " + raw_to_yaml(config_value(key));
    if (with_help) out += "  # " + key.help;
    out += "\n";
  }
  return out;
}

std::string config_help(const std::string& prefix) {
  RunConfig defaults;
  std::string out;
  for (const ConfigKey& key : config_keys(defaults))
    if (starts_with(key.name, prefix))
      out += fmt::format("  {:<52} {:<14} {} ({})\n", key.name, raw_to_yaml(config_value(key)),
                         key.help, expected_value(key));
  return out;
}

std::string config_markdown() {
  RunConfig defaults;
  std::string out = "| key | default | takes | meaning |\n|---|---|---|---|\n";
  for (const ConfigKey& key : config_keys(defaults))
    out += fmt::format("| `{}` | `{}` | {} | {} |\n", key.name, raw_to_yaml(config_value(key)),
                       expected_value(key), key.help);
  return out;
}

std::vector<std::string> config_differences(const RunConfig& a, const RunConfig& b) {
  RunConfig copy_a = a, copy_b = b;
  const auto keys_a = config_keys(copy_a), keys_b = config_keys(copy_b);
  std::vector<std::string> out;
  for (std::size_t i = 0; i < keys_a.size(); ++i) {
    const std::string was = raw_to_yaml(config_value(keys_a[i]));
    const std::string is = raw_to_yaml(config_value(keys_b[i]));
    if (decides(keys_a[i], b) && was != is)
      out.push_back(fmt::format("{}: {} -> {}", keys_a[i].name, was, is));
  }
  return out;
}

std::string config_hash(const RunConfig& config) {
  RunConfig copy = config;
  std::string text;
  for (const ConfigKey& key : config_keys(copy))
    if (decides(key, config)) text += key.name + ": " + raw_to_yaml(config_value(key)) + "\n";
  return base::content_hash(text);
}

}  // namespace lockstep::loop
