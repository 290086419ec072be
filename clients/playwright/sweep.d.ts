declare function sweep(): Promise<() => Promise<void>>;
export default sweep;
