// A driver for fuzz targets where libFuzzer is not at hand (g++): runs the seeds, then mutations of
// them for a time, under AddressSanitizer and UBSan where the build has them.
//
//   TARGET [--seconds N] [--seed N]   mutate; on a crash or a hang the input stays in crash-TARGET
//   TARGET FILE...                    run these inputs once each
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string_view>

#include "fuzz/fuzz.h"

namespace {

constexpr std::size_t kMaxInput = 1 << 20;
constexpr unsigned kHangSeconds = 20;
constexpr long kMaxMegabytes = 2048;

std::string current;     // the input that runs now
std::string crash_file;  // where it goes when it brings the program down

void keep_input() {
  std::FILE* out = std::fopen(crash_file.c_str(), "wb");
  if (out == nullptr) return;
  std::fwrite(current.data(), 1, current.size(), out);
  std::fclose(out);
  std::fprintf(stderr, "input of %zu bytes kept in %s\n", current.size(), crash_file.c_str());
}

void on_signal(int number) {
  std::fprintf(stderr, "%s\n", number == SIGALRM ? "an input runs too long" : "aborted");
  keep_input();
  std::_Exit(1);
}

void run(const std::string& input) {
  current = input;
  // A copy of exactly this size, so that a read beyond the end is seen.
  const std::vector<std::uint8_t> exact(input.begin(), input.end());
  ::alarm(kHangSeconds);
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
  ::alarm(0);
}

struct Mutator {
  std::mt19937_64 random;
  std::vector<std::string> pool, words;

  std::size_t below(std::size_t n) { return n == 0 ? 0 : random() % n; }
  template <typename T>
  const T& one_of(const std::vector<T>& list) {
    return list[below(list.size())];
  }
  // Numbers at the edges, and plain random ones, over up to 8 bytes.
  void put_number(std::string& s) {
    static constexpr std::uint64_t kEdges[] = {0,
                                               1,
                                               7,
                                               127,
                                               128,
                                               255,
                                               32767,
                                               65535,
                                               1u << 31,
                                               0x7FFFFFFF,
                                               0xFFFFFFFF,
                                               std::uint64_t{1} << 32,
                                               std::uint64_t{1} << 61,
                                               ~std::uint64_t{0} >> 1,
                                               ~std::uint64_t{0},
                                               ~std::uint64_t{0} - 7};
    const std::uint64_t n =
        below(4) != 0 ? kEdges[below(std::size(kEdges))] : random() >> below(64);
    const std::size_t width = std::size_t{1} << below(4), at = below(s.size());
    std::memcpy(s.data() + at, &n, std::min(width, s.size() - at));
  }
  void once(std::string& s) {
    const std::size_t at = below(s.size()),
                      length = below(1 + std::min<std::size_t>(s.size() - at, 64));
    switch (below(9)) {
      case 0:
        if (!s.empty()) s[at] = static_cast<char>(s[at] ^ (1 << below(8)));
        break;
      case 1:
        if (!s.empty()) s[at] = static_cast<char>(random());
        break;
      case 2:
        if (!s.empty()) put_number(s);
        break;
      case 3:
        s.erase(at, length);
        break;
      case 4:
        s.insert(at, s.substr(at, length));
        break;
      case 5:
        s.insert(at, one_of(words));
        break;
      case 6:
        s.replace(at, length, one_of(words));
        break;
      case 7:
        if (below(8) == 0) s.resize(at);
        break;
      default: {  // the end of another
        const std::string& other = one_of(pool);
        const std::size_t from = below(other.size());
        if (below(4) == 0)
          s = s.substr(0, at) + other.substr(from);
        else
          s.replace(at, length, other.substr(from, below(64)));
      }
    }
  }
  std::string next() {
    std::string s = one_of(pool);
    for (std::size_t n = std::size_t{1} << below(5); n > 0; --n) once(s);
    if (s.size() > kMaxInput) s.resize(kMaxInput);
    return s;
  }
};

int run_files(int count, char** files) {
  for (int i = 0; i < count; ++i) {
    std::ifstream in(files[i], std::ios::binary);
    if (!in) {
      std::fprintf(stderr, "cannot open %s\n", files[i]);
      return 2;
    }
    run({std::istreambuf_iterator<char>(in), {}});
  }
  std::printf("%d inputs ran\n", count);
  return 0;
}

}  // namespace

extern "C" {
void __sanitizer_set_death_callback(void (*)()) __attribute__((weak));
const char* __asan_default_options() { return "max_allocation_size_mb=1024"; }
}

int main(int argc, char** argv) {
  const std::string name = std::filesystem::path(argv[0]).filename();
  crash_file = "crash-" + name;
  double seconds = 10;
  std::uint64_t seed = 1;
  int first = 1;
  for (; first + 1 < argc && std::string_view(argv[first]).starts_with("--"); first += 2) {
    if (std::string_view(argv[first]) == "--seconds") seconds = std::atof(argv[first + 1]);
    if (std::string_view(argv[first]) == "--seed")
      seed = std::strtoull(argv[first + 1], nullptr, 10);
  }
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(keep_input);
  for (const int number : {SIGABRT, SIGALRM, SIGBUS, SIGILL}) std::signal(number, on_signal);
  if (first < argc) return run_files(argc - first, argv + first);

  Mutator mutator{std::mt19937_64(seed), lockstep::fuzz::seeds(), lockstep::fuzz::words()};
  for (const std::string& input : mutator.pool) run(input);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::uint64_t runs = mutator.pool.size();
  for (; std::chrono::steady_clock::now() < end; ++runs) run(mutator.next());

  struct rusage usage {};
  ::getrusage(RUSAGE_SELF, &usage);
  const long megabytes = usage.ru_maxrss / 1024;
  std::printf("%s: %llu inputs in %.0f s, at most %ld MB\n", name.c_str(),
              static_cast<unsigned long long>(runs), seconds, megabytes);
  return megabytes > kMaxMegabytes;
}
