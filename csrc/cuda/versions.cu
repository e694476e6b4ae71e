#include "versions.h"

#include <cuda_runtime.h>

namespace fastsn::cuda {

std::pair<int, int> versions() {
  int driver = 0;
  int runtime = 0;
  // Neither can fail: what no answer is given to stays 0.
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return {driver, runtime};
}

}  // namespace fastsn::cuda
