// Shows what the ThreadSanitizer build sees of OpenMP. `openmp_race clean` uses every construct
// that src/ uses, rightly; `openmp_race race` lets two threads add to one value; `openmp_race
// unordered` lets one thread read what another one writes between the same two barriers. The last
// two must be reported (tests/CMakeLists.txt).
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

constexpr int kThreads = 2, kItems = 1000, kRounds = 20;

// Values cross the start of a region, a barrier, a critical section and the end of a region.
long clean() {
  std::vector<long> x(kItems), y(kItems);
  long sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < kItems; ++i) x[i] = i + round;
#pragma omp parallel num_threads(kThreads)
    {
#pragma omp for schedule(dynamic)
      for (int i = 0; i < kItems; ++i) y[i] = 2 * x[i];  // ends with a barrier
      long part = 0;
#pragma omp for schedule(static) nowait
      for (int i = 0; i < kItems; ++i) part += y[kItems - 1 - i];
#pragma omp critical(openmp_race)
      sum += part;
#pragma omp barrier
#pragma omp for schedule(static) nowait
      for (int i = 0; i < kItems; ++i) x[i] = sum;
    }
    sum = x[round] - y[round];
  }
  return sum;
}

long race() {
  long sum = 0;
#pragma omp parallel for num_threads(kThreads) schedule(static)
  for (int i = 0; i < kItems; ++i) sum += i;
  return sum;
}

long unordered() {
  std::vector<long> x(kItems), y(kItems);
#pragma omp parallel num_threads(kThreads)
  {
#pragma omp for schedule(static) nowait
    for (int i = 0; i < kItems; ++i) x[i] = i;
#pragma omp for schedule(static)
    for (int i = 0; i < kItems; ++i) y[i] = x[kItems - 1 - i];
  }
  return y[0];
}

}  // namespace

int main(int argc, char** argv) {
  const char* what = argc > 1 ? argv[1] : "";
  if (std::strcmp(what, "clean") == 0) return std::printf("%ld\n", clean()) < 0;
  if (std::strcmp(what, "race") == 0) return std::printf("%ld\n", race()) < 0;
  if (std::strcmp(what, "unordered") == 0) return std::printf("%ld\n", unordered()) < 0;
  std::fputs("usage: openmp_race clean|race|unordered\n", stderr);
  return 2;
}
