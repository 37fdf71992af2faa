#include "loop/checkpoint_manifest.h"

#include <nlohmann/json.hpp>
#include <set>

#include "base/content_hash.h"
#include "base/error.h"

namespace lockstep::loop {

using base::fail;
using base::InputError;

static const std::string kSelfField = "\"manifest_xxh3_128\": \"";
static const std::string kZeroHash(32, '0');

std::string manifest_text(const Manifest& manifest) {
  nlohmann::ordered_json files = nlohmann::ordered_json::array();
  for (const ManifestFile& f : manifest.files)
    files.push_back({{"file", f.file}, {"bytes", f.bytes}, {"xxh3_128", f.xxh3_128}});
  nlohmann::ordered_json json = {{"format", 1},
                                 {"step", manifest.step},
                                 {"contract_version", manifest.contract_version},
                                 {"config_hash", manifest.config_hash},
                                 {"healthy", manifest.healthy},
                                 {"metric", nullptr},
                                 {"files", std::move(files)},
                                 {"manifest_xxh3_128", kZeroHash}};
  if (manifest.metric) json["metric"] = *manifest.metric;
  std::string text = json.dump(2) + "\n";
  text.replace(text.rfind(kSelfField) + kSelfField.size(), kZeroHash.size(),
               base::content_hash(text));
  return text;
}

static void check_own_hash(const std::string& text, const std::string& where) {
  const std::size_t field = text.rfind(kSelfField);
  const std::size_t at = field + kSelfField.size();
  if (field == std::string::npos || at + kZeroHash.size() > text.size())
    fail<InputError>("{}: the end is missing (truncated?)", where);
  std::string zeroed = text;
  zeroed.replace(at, kZeroHash.size(), kZeroHash);
  if (base::content_hash(zeroed) != text.substr(at, kZeroHash.size()))
    fail<InputError>("{}: changed since it was written", where);
}

static bool stays_inside(const std::filesystem::path& file) {
  if (file.empty() || file.is_absolute()) return false;
  for (const auto& part : file)
    if (part == ".." || part == "." || part.empty()) return false;
  return true;
}

Manifest parse_manifest(const std::string& text, const std::string& where) {
  check_own_hash(text, where);
  const auto shallow = [](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    if (depth > 8) throw std::invalid_argument("nested too deeply");
    return true;
  };
  Manifest out;
  try {
    const nlohmann::json json = nlohmann::json::parse(text, shallow);
    if (json.at("format") != 1) fail<InputError>("{}: of a newer format", where);
    json.at("step").get_to(out.step);
    json.at("contract_version").get_to(out.contract_version);
    json.at("config_hash").get_to(out.config_hash);
    json.at("healthy").get_to(out.healthy);
    if (!json.at("metric").is_null()) out.metric = json.at("metric").get<double>();
    for (const auto& f : json.at("files"))
      out.files.push_back({f.at("file"), f.at("bytes"), f.at("xxh3_128")});
  } catch (const nlohmann::json::exception& e) {
    fail<InputError>("{}: {}", where, e.what());
  } catch (const std::invalid_argument& e) {
    fail<InputError>("{}: {}", where, e.what());
  }
  std::set<std::string> names;
  for (const ManifestFile& f : out.files)
    if (!stays_inside(f.file) || !names.insert(f.file).second)
      fail<InputError>("{}: file name '{}' is not allowed or stands twice", where, f.file);
  return out;
}

}  // namespace lockstep::loop
