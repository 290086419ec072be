export interface User {
  id: string;
  login: string;
  /** null where the deployment stores only hashes */
  password: string | null;
  project_id: string;
  env: string;
  domain: string;
  labels: Record<string, string>;
}

export interface Lock {
  id: string;
  fence: number;
  holder: string;
  note: string;
  ttl: number;
  acquired_at: string;
  expires_at: string;
  user: User;
}

export interface Options {
  /** seconds after which the user is free again when this process is gone; renewed every third of it (60) */
  ttl?: number;
  /** seconds to wait for a user (300) */
  wait?: number;
  note?: string;
}

/** Which user: the fields of `POST /locks`, or `user`, the id of this very one. */
export interface Filter extends Options {
  project_id?: string;
  env?: string;
  domain?: string;
  labels?: Record<string, string>;
  prefer?: 'any' | 'session';
  user?: string;
}

export interface Wish extends Pick<Filter, 'project_id' | 'env' | 'domain' | 'labels'> {
  count?: number;
}

export interface FarmOptions {
  /** BOTFARM_URL */
  url?: string;
  /** BOTFARM_CLIENT_ID */
  clientId?: string;
  /** BOTFARM_CLIENT_SECRET */
  clientSecret?: string;
  /** BOTFARM_ID_TOKEN: exchanged for a token of the service */
  idToken?: string;
  /** BOTFARM_HOLDER: who asks, for people and for `sweep` */
  holder?: string;
  /** process.env */
  env?: Record<string, string | undefined>;
}

export class Farm {
  constructor(options?: FarmOptions);
  readonly holder: string;
  acquire(filter: Filter): Promise<Bot>;
  /** Several users, all or none, in the order asked. */
  acquireSet(users: Wish[], options?: Options): Promise<Bot[]>;
  /** Give back all that this holder has, whoever took it; how many that were. */
  sweep(): Promise<number>;
}

/** A user that is held, and renewed until it is released or lost. */
export class Bot {
  private constructor();
  readonly lock: Lock;
  readonly user: User;
  readonly login: string;
  /** null where the deployment stores only hashes */
  readonly password: string | null;
  readonly labels: Record<string, string>;
  /** Aborted when the user is lost; its `reason` is a `LockLost`. */
  readonly signal: AbortSignal;
  /** What the last one stored who was logged in as this user: any JSON; undefined where there is none. */
  session(): Promise<any>;
  /** Keep a session for the next holder: JSON of up to 256 KiB, worth something for `ttl` seconds (a day). */
  storeSession(session: unknown, options?: { ttl?: number }): Promise<void>;
  deleteSession(): Promise<void>;
  /** A one-time code, given to nobody else. After one it is a period until the next: 30 s with most systems. */
  totp(): Promise<string>;
  release(told?: { outcome?: 'passed' | 'failed' | 'bad-login'; cooldown?: number; quarantine?: string }): Promise<void>;
}

export class Refused extends Error {
  readonly status: number;
  readonly slug: string | undefined;
  readonly problem: Record<string, unknown>;
}
export class Unreached extends Error {}
export class LockLost extends Error {}
