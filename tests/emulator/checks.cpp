// As a file of another name than csrc/cuda/means.cpp: all object files come into one folder.
#include "../../csrc/means.cpp"
