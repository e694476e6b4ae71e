// What tests set and ask, as functions for ctypes; see ../emulated.py.
#include <cuda_runtime.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int emulator_set_order(const char* text) {
  try {
    cuda_emulator::machine.set_order(text);
  } catch (const std::invalid_argument&) {
    return 1;
  }
  return 0;
}

EXPORT void emulator_fail_next_launch(int error) {
  cuda_emulator::fail_next_launch(static_cast<cudaError_t>(error));
}

EXPORT size_t emulator_launch_count() { return cuda_emulator::launch_count(); }
