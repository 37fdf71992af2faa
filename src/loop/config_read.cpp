#include "loop/config_read.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <set>

#include "base/error.h"

namespace lockstep::loop {

using base::fail;
using base::InputError;

namespace {

constexpr int kMaxDepth = 16;
constexpr int kMaxNodes = 20000;  // aliases make a small text stand for a huge tree

int edit_distance(const std::string& a, const std::string& b) {
  std::vector<int> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int>(j);
  for (std::size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const int change = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, change});
    }
  }
  return row.back();
}

std::string last_part(const std::string& key) { return key.substr(key.rfind('.') + 1); }

struct Reader {
  const std::vector<ConfigKey>& keys;
  std::string source;
  bool line_numbers;
  ConfigEntries entries = {};
  int nodes = 0;

  std::string where(const YAML::Mark& mark) const {
    return line_numbers && mark.line >= 0 ? fmt::format("{}:{}", source, mark.line + 1) : source;
  }

  void count(const YAML::Node& node, int depth) {
    if (depth > kMaxDepth || ++nodes > kMaxNodes)
      fail<InputError>("{}: nested too deeply or too large (aliases count in full)",
                       where(node.Mark()));
  }

  std::string scalar(const YAML::Node& node, const std::string& key, int depth) {
    count(node, depth);
    if (!node.IsScalar())
      fail<InputError>("{}: {} holds a nested value, expected a plain one", where(node.Mark()),
                       key);
    return node.Scalar();
  }

  RawValue leaf(const YAML::Node& node, const std::string& key, int depth) {
    RawValue out;
    if (node.IsScalar()) {
      out.kind = RawValue::kScalar;
      out.text = node.Scalar();
    } else if (node.IsSequence()) {
      out.kind = RawValue::kList;
      for (const YAML::Node& item : node) out.items.push_back(scalar(item, key, depth + 1));
    } else if (node.IsMap()) {
      out.kind = RawValue::kMap;
      std::set<std::string> seen;
      for (const auto& pair : node) {
        const std::string name = scalar(pair.first, key, depth + 1);
        if (!seen.insert(name).second)
          fail<InputError>("{}: {} has the name '{}' twice", where(pair.first.Mark()), key, name);
        out.pairs.emplace_back(name, scalar(pair.second, key + "." + name, depth + 1));
      }
    }
    return out;
  }

  void section(const YAML::Node& node, const std::string& prefix, int depth) {
    count(node, depth);
    if (node.IsNull()) return;  // "grpo:" with nothing below
    if (!node.IsMap())
      fail<InputError>("{}: {} is a section, expected keys below it", where(node.Mark()),
                       prefix.empty() ? "the document" : prefix);
    std::set<std::string> seen;
    for (const auto& pair : node) {
      count(pair.first, depth);
      if (!pair.first.IsScalar())
        fail<InputError>("{}: a key must be a plain name", where(pair.first.Mark()));
      const std::string key =
          prefix.empty() ? pair.first.Scalar() : prefix + "." + pair.first.Scalar();
      const std::string at = where(pair.first.Mark());
      if (!seen.insert(key).second) fail<InputError>("{}: duplicate key {}", at, key);
      const auto is_key = [&](const ConfigKey& k) { return k.name == key; };
      const auto below = [&](const ConfigKey& k) { return k.name.rfind(key + ".", 0) == 0; };
      if (std::any_of(keys.begin(), keys.end(), is_key)) {
        count(pair.second, depth);
        const auto [old, fresh] =
            entries.emplace(key, ConfigEntry{leaf(pair.second, key, depth), at});
        if (!fresh)
          fail<InputError>("{}: duplicate key {} (first at {})", at, key, old->second.where);
      } else if (std::any_of(keys.begin(), keys.end(), below)) {
        section(pair.second, key, depth + 1);
      } else {
        fail<InputError>("{}: unknown key {}{}", at, key, did_you_mean(key, keys));
      }
    }
  }
};

}  // namespace

std::string did_you_mean(const std::string& key, const std::vector<ConfigKey>& keys) {
  if (key.size() > 200) return "";
  std::string best;
  int best_score = 1 << 20;
  const auto offer = [&](const std::string& candidate) {
    // The right leaf in the wrong section is as near as one slip of the finger.
    const int moved = last_part(candidate) == last_part(key) ? 1 : 1 << 20;
    const int score = std::min(edit_distance(key, candidate), moved);
    if (score < best_score) {
      best_score = score;
      best = candidate;
    }
  };
  for (const ConfigKey& k : keys) {
    offer(k.name);
    for (std::size_t dot = k.name.find('.'); dot != std::string::npos;
         dot = k.name.find('.', dot + 1))
      offer(k.name.substr(0, dot));
  }
  const int near = std::max<int>(2, static_cast<int>(key.size()) / 4);
  return best_score <= near ? fmt::format(", did you mean {}?", best) : "";
}

ConfigEntries read_config_yaml(const std::string& text, const std::string& source,
                               bool line_numbers, const std::vector<ConfigKey>& keys) {
  Reader reader{keys, source, line_numbers};
  try {
    const std::vector<YAML::Node> documents = YAML::LoadAll(text);
    if (documents.size() > 1)
      fail<InputError>("{}: {} YAML documents in one file, expected one", source, documents.size());
    if (!documents.empty()) reader.section(documents[0], "", 0);
  } catch (const YAML::Exception& e) {
    fail<InputError>("{}: {}", reader.where(e.mark), e.msg);
  }
  return reader.entries;
}

ConfigEntries read_config_override(const std::string& text, const std::vector<ConfigKey>& keys) {
  const std::string source = fmt::format("override '{}'", text);
  const std::size_t equals = text.find('=');
  if (equals == 0 || equals == std::string::npos)
    fail<InputError>("{}: expected key=value, such as policy.optimizer.lr=1e-6", source);
  // As a document of one dotted key: a section's value may be a map of its keys.
  std::string quoted;
  for (const char c : text.substr(0, equals))
    quoted += c == '\'' ? std::string("''") : std::string(1, c);
  return read_config_yaml("'" + quoted + "': " + text.substr(equals + 1), source, false, keys);
}

}  // namespace lockstep::loop
